#include "stream.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

namespace dbmtl_fused::cuda {

DeviceOf::DeviceOf(const torch::stable::Tensor& tensor) : index_(tensor.get_device_index()) { guard_.emplace(index_); }

cudaStream_t DeviceOf::stream() const {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace dbmtl_fused::cuda
