#pragma once

#define MASKED_LOSS_API __attribute__((visibility("default")))
