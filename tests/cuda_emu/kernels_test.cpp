// Runs every kernel on small odd shapes under the emulation and compares with a float64 oracle. Meant for sanitizers:
// arrays end where their memory ends.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cuda/launch.h"

namespace dbmtl_fused::cuda {
namespace {

const Device kDevice{2, 40 * 1024, true};

int failures = 0;

void expect(bool good, const std::string& what) {
  if (good) return;
  std::printf("FAILED: %s\n", what.c_str());
  ++failures;
}

double widen(double value) { return value; }
double widen(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

void set(float& to, double value) { to = static_cast<float>(value); }
void set(double& to, double value) { to = value; }
void set(bool& to, double value) { to = value > 0; }
void set(BFloat16& to, double value) {
  const auto narrow = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &narrow, sizeof bits);
  to.bits = static_cast<uint16_t>(bits >> 16);
}

template <class Element>
constexpr DType kDTypeOf = std::is_same_v<Element, float>    ? DType::kFloat32
                           : std::is_same_v<Element, double> ? DType::kFloat64
                                                             : DType::kBFloat16;

template <class State>
constexpr double kTolerance = kIsRounded<State>              ? 0.01
                              : std::is_same_v<State, float> ? 1e-5
                                                             : 1e-13;

// Normal numbers, `offset` elements past an aligned address; what follows them is not ours.
template <class Element>
class Array {
 public:
  explicit Array(int64_t size, int64_t offset = 0) : size_(size), memory_(new Element[offset + size]) {
    static std::mt19937 generator(1);
    static std::normal_distribution<double> normal;
    data = memory_ + offset;
    for (int64_t i = 0; i < size; ++i) set(data[i], normal(generator));
  }
  ~Array() { delete[] memory_; }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  std::vector<double> values() const {
    std::vector<double> result(size_);
    for (int64_t i = 0; i < size_; ++i) result[i] = widen(data[i]);
    return result;
  }

  Element* data;

 private:
  int64_t size_;
  Element* memory_;
};

template <class Loss, class Real>
void test_begin_step(int64_t T, int64_t offset, bool log, bool accumulate) {
  const std::string name = "begin_step T=" + std::to_string(T) + " offset " + std::to_string(offset);
  Array<Loss> losses(T, offset), seeds(T, offset);
  Array<bool> active(T, offset);
  Array<Real> betas(T, offset);
  const Loss scale = 4;
  const int64_t step = 3;
  Real inv_scale;
  float found_inf = accumulate ? 1 : NAN;
  const BeginStep<Loss, Real> args{losses.data, accumulate ? active.data : nullptr,
                                   T,           &scale,
                                   &step,       0.5,
                                   1,           2,
                                   log,         0.25,
                                   accumulate,  seeds.data,
                                   betas.data,  &inv_scale,
                                   &found_inf};
  expect(launch_begin_step(args, nullptr) == cudaSuccess, name + ": launch");

  bool found = accumulate;
  for (int64_t t = 0; t < T; ++t) {
    const bool takes_part = !args.active || active.data[t], usable = !log || losses.data[t] >= 0;
    const double exact = !takes_part ? 0 : log ? 2 / (widen(losses.data[t]) + 0.25) : 2;
    if (takes_part && !usable)
      expect(std::isnan(seeds.data[t]), name + ": seed of an unusable loss");
    else
      expect(std::abs(seeds.data[t] - exact) <= kTolerance<Loss> * exact, name + ": seeds");
    expect(betas.data[t] == (takes_part && usable ? 0.125 : 1), name + ": betas");
    found |= takes_part && !usable;
  }
  expect(inv_scale == 0.25, name + ": inv_scale");
  expect(found_inf == (found ? 1 : 0), name + ": found_inf");
}

template <class State, class Grad>
void test_balance(int64_t T, int64_t P, int64_t padding, int64_t offset, bool cooperative) {
  using Real = RealOf<State>;
  const std::string name = "balance_ T=" + std::to_string(T) + " P=" + std::to_string(P) + " padding " +
                           std::to_string(padding) + " offset " + std::to_string(offset);
  const int64_t stride = P + padding;
  Array<State> ema(T * stride, offset);
  Array<Grad> grads(T * stride, offset);
  Array<Real> norms(T), weights(T), out(P, offset);
  const Real beta = 0.75;
  const int64_t seed = 7;
  float found_inf = 0;
  const std::vector<double> m = ema.values(), g = grads.values();

  const Device device{kDevice.sms, kDevice.shared_bytes, cooperative};
  const BalancePlan plan = plan_balance(T, P, sizeof(State), device);
  Array<Real> workspace(plan.workspace);
  const Balance<State> args{ema.data,
                            stride,
                            grads.data,
                            kDTypeOf<Grad>,
                            stride,
                            T,
                            P,
                            &beta,
                            kIsRounded<State> ? &seed : nullptr,
                            {Alpha::kMax, 0, 1e-8, nullptr, norms.data, weights.data},
                            out.data,
                            kDTypeOf<Real>,
                            &found_inf};
  expect(launch_balance(args, plan, workspace.data, nullptr) == cudaSuccess, name + ": launch");

  const std::vector<double> stored = ema.values();
  std::vector<double> exact(P), size(P), norm(T);
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t p = 0; p < P; ++p) {
      const int64_t i = t * stride + p;
      const double updated = 0.75 * m[i] + 0.25 * g[i];
      expect(std::abs(stored[i] - updated) <= kTolerance<State> * (std::abs(m[i]) + std::abs(g[i])), name + ": ema");
      norm[t] += stored[i] * stored[i];
    }
    norm[t] = std::sqrt(norm[t]);
    expect(std::abs(norms.data[t] - norm[t]) <= 1e-5 * norm[t], name + ": norms");
  }
  const double alpha = *std::max_element(norm.begin(), norm.end());
  for (int64_t t = 0; t < T; ++t)
    for (int64_t p = 0; p < P; ++p) {
      const double term = alpha / (norm[t] + 1e-8) * stored[t * stride + p];
      exact[p] += term;
      size[p] += std::abs(term);
    }
  for (int64_t p = 0; p < P; ++p) expect(std::abs(out.data[p] - exact[p]) <= 1e-5 * size[p] + 1e-30, name + ": out");
  expect(found_inf == 0, name + ": found_inf");
}

template <class State>
void test_combine(int64_t T, int64_t P, int64_t offset, Alpha alpha, bool accumulate) {
  using Real = RealOf<State>;
  const std::string name = "combine T=" + std::to_string(T) + " P=" + std::to_string(P) + " offset " +
                           std::to_string(offset) + " alpha " + std::to_string(static_cast<int>(alpha));
  Array<State> ema(T * P, offset);
  Array<Real> sq_norms(T), preference(T), norms(T), weights(T), out(P, offset);
  for (int64_t t = 0; t < T; ++t) {
    sq_norms.data[t] = static_cast<Real>(1 + (t * 7) % T);
    preference.data[t] = static_cast<Real>(t % 3);
  }
  const bool prefers = P % 2 == 1;
  const Real scale = 2;
  Real alpha_value, out_sq_norm;
  const float found_inf = 0;
  int32_t arrivals = 0;
  int64_t step = 7;
  const std::vector<double> before = out.values(), m = ema.values();
  const CombinePlan plan = plan_combine(T, P, sizeof(State), kDevice);
  Array<Real> workspace(plan.workspace);
  const Combine<State> args{ema.data,
                            P,
                            T,
                            P,
                            sq_norms.data,
                            &found_inf,
                            &scale,
                            {alpha, 3, 1e-8, prefers ? preference.data : nullptr, norms.data, weights.data},
                            accumulate,
                            out.data,
                            kDTypeOf<Real>,
                            &alpha_value,
                            &out_sq_norm,
                            prefers ? &step : nullptr};
  expect(launch_combine(args, plan, workspace.data, &arrivals, nullptr) == cudaSuccess, name + ": launch");
  expect(arrivals == 0, name + ": arrivals");
  expect(step == (prefers ? 8 : 7), name + ": step");

  std::vector<double> norm(T), ordered;
  double mean = 0;
  for (int64_t t = 0; t < T; ++t) {
    norm[t] = std::sqrt(sq_norms.data[t]);
    if (prefers && preference.data[t] == 0) continue;
    ordered.push_back(norm[t]);
    mean += norm[t];
  }
  std::sort(ordered.begin(), ordered.end());
  const size_t number = ordered.size();
  double exact = alpha == Alpha::kConstant ? 3 : alpha == Alpha::kNone ? 1 : 0;
  if (number > 0 && exact == 0) {
    const double median = (ordered[(number - 1) / 2] + ordered[number / 2]) / 2;
    const double expected[] = {ordered[number - 1], ordered[0], mean / static_cast<double>(number), median};
    exact = expected[static_cast<int>(alpha)];
  }
  expect(std::abs(alpha_value - exact) <= 1e-5 * exact, name + ": alpha");
  double square = 0;
  for (int64_t p = 0; p < P; ++p) {
    double sum = accumulate ? before[p] : 0, size = std::abs(sum);
    for (int64_t t = 0; t < T; ++t) {
      const double balanced = alpha == Alpha::kNone ? 1 : exact / (norm[t] + 1e-8);
      const double term = 2 * balanced * (prefers ? preference.data[t] : 1) * m[t * P + p];
      sum += term;
      size += std::abs(term);
    }
    square += sum * sum;
    expect(std::abs(out.data[p] - sum) <= 1e-5 * size, name + ": out");
  }
  expect(std::abs(out_sq_norm - square) <= 1e-4 * square, name + ": out_sq_norm");
}

template <class State>
void test_gram(int64_t T, int64_t P, int64_t padding, int64_t offset) {
  using Real = RealOf<State>;
  const std::string name = "gram T=" + std::to_string(T) + " P=" + std::to_string(P) + " padding " +
                           std::to_string(padding) + " offset " + std::to_string(offset);
  const int64_t stride = P + padding;
  Array<State> ema(T * stride - padding, offset);
  Array<Real> out(T * T);
  int32_t arrivals = 0;
  const GramPlan plan = plan_gram(T, P, sizeof(State), kDevice);
  Array<Real> workspace(plan.workspace);
  const Gram<State> args{ema.data, stride, T, P, out.data};
  expect(launch_gram(args, plan, workspace.data, &arrivals, nullptr) == cudaSuccess, name + ": launch");
  expect(arrivals == 0, name + ": arrivals");

  const std::vector<double> m = ema.values();
  for (int64_t s = 0; s < T; ++s)
    for (int64_t t = 0; t < T; ++t) {
      double sum = 0, size = 0;
      for (int64_t p = 0; p < P; ++p) {
        const double product = m[s * stride + p] * m[t * stride + p];
        sum += product;
        size += std::abs(product);
      }
      expect(std::abs(out.data[s * T + t] - sum) <= 1e-5 * size, name + ": out");
    }
}

template <class State, class Grad>
void test_ema_update(const std::vector<int64_t>& numels, int64_t offset, int64_t align) {
  using Real = RealOf<State>;
  const std::string name = "ema_update_ offset " + std::to_string(offset);
  std::vector<int64_t> chunks, slots;
  std::vector<Gradient> gradients;
  std::vector<std::unique_ptr<Array<Grad>>> grads;
  int64_t P = 0, C = 0;
  for (size_t slot = 0; slot < numels.size(); ++slot) {
    const int64_t numel = numels[slot];
    grads.push_back(std::make_unique<Array<Grad>>(numel, offset));
    const bool listed = slot % 4 != 3, given = slot % 4 != 2;
    if (listed) {
      slots.push_back(static_cast<int64_t>(slot));
      gradients.push_back({given ? grads.back()->data : nullptr, kDTypeOf<Grad>, P, numel, C});
    }
    for (int64_t first = 0; first < numel; first += kChunk, ++C)
      chunks.insert(chunks.end(), {static_cast<int64_t>(slot), P + first, std::min(kChunk, numel - first)});
    P += ceil_div(numel, align) * align;
  }
  Array<State> row(P);
  Array<Real> partials(C);
  for (int64_t c = 0; c < C; ++c) partials.data[c] = 0;
  const std::vector<double> m = row.values();
  const Real beta = 0.75, inv_scale = 0.5;
  const int64_t seed = -5;
  Real sq_norm;
  float found_inf = 0;
  int32_t arrivals = 0;
  const EmaUpdate<State> args{row.data,
                              gradients.data(),
                              static_cast<int64_t>(gradients.size()),
                              &beta,
                              &inv_scale,
                              kIsRounded<State> ? &seed : nullptr,
                              partials.data,
                              C,
                              &sq_norm,
                              &found_inf,
                              false};
  expect(launch_ema_update(args, {chunks.data(), slots.data(), &arrivals}, nullptr) == cudaSuccess, name + ": launch");

  const std::vector<double> stored = row.values();
  std::vector<double> exact = m;
  double square = 0;
  for (size_t i = 0; i < gradients.size(); ++i)
    for (int64_t p = 0; p < gradients[i].numel; ++p) {
      const int64_t column = gradients[i].start + p;
      const double g = gradients[i].data ? widen(static_cast<const Grad*>(gradients[i].data)[p]) : 0;
      exact[column] = 0.75 * m[column] + 0.25 * 0.5 * g;
      expect(std::abs(stored[column] - exact[column]) <= kTolerance<State> * (std::abs(m[column]) + std::abs(g)),
             name + ": row");
      exact[column] = stored[column];
      square += stored[column] * stored[column];
    }
  for (int64_t p = 0; p < P; ++p) expect(stored[p] == exact[p], name + ": a column of no listed slot");
  expect(std::abs(sq_norm - square) <= 1e-5 * square, name + ": sq_norm");
  expect(arrivals == 0, name + ": arrivals");
}

template <class Loss, class Real>
void test_losses() {
  for (int64_t T : {1, 33, 128, 300}) {
    test_begin_step<Loss, Real>(T, T % 2, true, false);
    test_begin_step<Loss, Real>(T, 1 - T % 2, true, true);
    test_begin_step<Loss, Real>(T, 0, false, T > 100);
  }
}

template <class State>
void test_state() {
  for (int64_t T : {1, 2, 3, 4, 5, 9})
    for (int64_t P : {1, 130, 1027}) test_balance<State, float>(T, P, 0, 0, true);
  test_balance<State, BFloat16>(3, 5000, 120, 0, true);
  test_balance<State, double>(3, 1027, 5, 1, true);
  test_balance<State, float>(3, 1027, 1, 0, false);
  test_balance<State, float>(300, 130, 6, 0, true);
  for (int alpha = 0; alpha < 6; ++alpha) test_combine<State>(5, 1027, 0, static_cast<Alpha>(alpha), alpha % 2 == 0);
  for (int64_t T : {1, 2, 8, 9, 300}) test_combine<State>(T, 513 + T % 2, T % 2, Alpha::kMedian, T % 2 == 0);
  test_gram<State>(3, 1027, 5, 0);
  test_gram<State>(5, 1027, 1, 1);
  test_gram<State>(50, 140, 4, 0);
  const std::vector<int64_t> numels = {5, 4097, 0, 300, 1, 9000, 256, 77};
  test_ema_update<State, float>(numels, 0, 256);
  test_ema_update<State, BFloat16>(numels, 1, 256);
  test_ema_update<State, double>(numels, 0, 3);
}

}  // namespace
}  // namespace dbmtl_fused::cuda

int main() {
  using namespace dbmtl_fused;
  cuda::test_losses<float, float>();
  cuda::test_losses<float, double>();
  cuda::test_losses<double, float>();
  cuda::test_losses<double, double>();
  cuda::test_state<float>();
  cuda::test_state<double>();
  cuda::test_state<BFloat16>();
  std::printf(cuda::failures ? "%d failures\n" : "all good\n", cuda::failures);
  return cuda::failures != 0;
}
