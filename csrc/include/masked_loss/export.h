#pragma once

#if defined(_WIN32)
#if defined(MASKED_LOSS_BUILDING)
#define MASKED_LOSS_API __declspec(dllexport)
#else
#define MASKED_LOSS_API __declspec(dllimport)
#endif
#else
#define MASKED_LOSS_API __attribute__((visibility("default")))
#endif
