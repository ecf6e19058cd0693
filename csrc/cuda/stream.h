// Where a call runs.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace dbmtl_fused::cuda {

// Makes the device of a tensor the current one while it lives: kernels go there, whatever the caller's is.
class DeviceOf {
 public:
  explicit DeviceOf(const torch::stable::Tensor& tensor);

  int32_t index() const { return index_; }
  // torch's current one.
  cudaStream_t stream() const;

 private:
  int32_t index_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

}  // namespace dbmtl_fused::cuda
