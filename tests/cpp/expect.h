#pragma once

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <string>

namespace masked_loss::test {

inline at::Tensor bools(at::IntArrayRef values) { return at::tensor(values, at::kLong).to(at::kBool); }

// Value for value, with a tolerance for what is summed in another order; NaN equals NaN.
inline void expect_close(const at::Tensor& actual, const at::Tensor& expected, double tolerance = 1e-12) {
  ASSERT_EQ(actual.sizes(), expected.sizes());
  ASSERT_EQ(actual.scalar_type(), expected.scalar_type());
  EXPECT_TRUE(at::allclose(actual, expected, tolerance, tolerance, /*equal_nan=*/true))
      << "actual " << actual << "\nexpected " << expected;
}

// The same values, not nearly: -0 differs from +0, and NaN from nothing else.
inline void expect_bitwise(const at::Tensor& actual, const at::Tensor& expected) {
  ASSERT_EQ(actual.sizes(), expected.sizes());
  ASSERT_EQ(actual.scalar_type(), expected.scalar_type());
  const auto bytes = [](const at::Tensor& tensor) { return tensor.contiguous().flatten().view(at::kByte); };
  EXPECT_TRUE(at::equal(bytes(actual), bytes(expected))) << "actual " << actual << "\nexpected " << expected;
}

template <class Error, class Function>
void expect_error(const Function& function, const std::string& message) {
  try {
    function();
    FAIL() << "no error; expected: " << message;
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what_without_backtrace()).find(message), std::string::npos)
        << "actual: " << error.what_without_backtrace() << "\nexpected: " << message;
  }
}

}  // namespace masked_loss::test
