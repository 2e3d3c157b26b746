#pragma once

// Loss functions with a mask. Masked positions are left out of the loss, of its mean and of the gradient.
#include <masked_loss/cross_entropy.h>
#include <masked_loss/linear.h>
#include <masked_loss/masked_fill.h>
#include <masked_loss/masks.h>
#include <masked_loss/memory.h>
#include <masked_loss/pointwise.h>
#include <masked_loss/reductions.h>
#include <masked_loss/softmax.h>
