// Drawing tokens without sorting the vocabulary. Weights are float64, as in the twin, so that both draw the same token.
#include <algorithm>
#include <vector>

#include "kernel.h"

namespace shoal {
namespace {

constexpr int kBins = 2048;
constexpr int kChunk = 256;  // tokens whose kept weights are summed together for the draw

typedef double Doubles __attribute__((vector_size(64)));
typedef int64_t Longs __attribute__((vector_size(64)));
typedef float Floats8 __attribute__((vector_size(32)));

// exp(x) for x <= 0, within an unit or two in the last place of float64; 0 below -700.
SHOAL_INLINE Doubles exp_negative(Doubles x) {
  const Longs is_zero = x < -700.0;
  x = (Doubles)((Longs)x & ~is_zero);
  const double magic = 6755399441055744.0;  // 1.5 * 2^52 rounds to an integer in the low bits
  const Doubles shifted = x * 1.4426950408889634 + magic;
  const Doubles n = shifted - magic;
  const Doubles r = (x - n * 0.693145751953125) - n * 1.42860682030941723212e-6;
  Doubles y = Doubles{} + 1.0 / 6227020800.0;
  for (const double factorial : {479001600.0, 39916800.0, 3628800.0, 362880.0, 40320.0, 5040.0, 720.0, 120.0, 24.0, 6.0,
                                 2.0, 1.0, 1.0})
    y = y * r + 1.0 / factorial;
  const Longs exponent = (Longs)shifted << 52;
  return (Doubles)(((Longs)y + exponent) & ~is_zero);
}

float highest(const float* logits, int vocab) {
  Vec top = splat(logits[0]);
  int i = 0;
  for (; i + kLanes <= vocab; i += kLanes) top = maximum(load_raw<Vec>(logits + i), top);
  float result = max_lanes(top);
  for (; i < vocab; ++i) result = std::max(result, logits[i]);
  return result;
}

void weigh(double* weights, const float* logits, int vocab, double top, double temperature) {
  for (int i = 0; i < vocab; i += 8) {
    Floats8 some{};
    const int n = std::min(8, vocab - i);
    if (n == 8)
      some = load_raw<Floats8>(logits + i);
    else
      std::memcpy(&some, logits + i, n * sizeof(float));
    const Doubles weight = exp_negative((__builtin_convertvector(some, Doubles) - top) / temperature);
    std::memcpy(weights + i, &weight, n * sizeof(double));
  }
}

// The highest logit t such that the masses of all logits >= t sum to at least `target`: one histogram over the logits
// within `range` of the top, then a sort of the one bin in which the sum crosses the target.
template <class Mass>
float threshold(const float* logits, int vocab, float top, float range, double target, Mass mass) {
  double bins[kBins] = {};
  const float per_logit = (kBins - 1) / std::max(range, 1e-30f);
  const auto bin_of = [&](float logit) { return (int)std::min((float)(kBins - 1), (top - logit) * per_logit); };  // NaN: the last
  for (int i = 0; i < vocab; ++i) bins[bin_of(logits[i])] += mass(i);
  double sum = 0;
  int crossing = 0;
  while (crossing < kBins - 1 && sum + bins[crossing] < target) sum += bins[crossing++];
  std::vector<std::pair<float, double>> members;
  for (int i = 0; i < vocab; ++i)
    if (bin_of(logits[i]) == crossing && mass(i) > 0) members.push_back({logits[i], mass(i)});
  std::sort(members.begin(), members.end(), [](auto& a, auto& b) { return a.first > b.first; });
  float last = top;
  for (const auto& [logit, amount] : members) {
    last = logit;
    sum += amount;
    if (sum >= target) break;
  }
  return last;
}

void keep_from(double* weights, const float* logits, int vocab, float lowest) {
  for (int i = 0; i < vocab; ++i) weights[i] = logits[i] >= lowest ? weights[i] : 0.0;
}

int64_t draw(const double* weights, int vocab, double uniform) {
  static thread_local std::vector<double> sums;
  sums.clear();
  double total = 0;
  for (int begin = 0; begin < vocab; begin += kChunk) {
    Doubles lanes{};
    double sum = 0;
    int i = begin;
    const int end = std::min(begin + kChunk, vocab);
    for (; i + 8 <= end; i += 8) lanes += load_raw<Doubles>(weights + i);
    for (; i < end; ++i) sum += weights[i];
    for (int lane = 0; lane < 8; ++lane) sum += lanes[lane];
    sums.push_back(sum);
    total += sum;
  }
  const double target = uniform * total;
  double running = 0;
  int chunk = 0;
  while (chunk + 1 < (int)sums.size() && running + sums[chunk] <= target) running += sums[chunk++];
  int64_t last = 0;
  for (int i = chunk * kChunk; i < vocab; ++i) {
    if (weights[i] == 0) continue;
    last = i;
    running += weights[i];
    if (running > target) break;
  }
  return last;
}

int64_t sample_row(const float* logits, int vocab, float temperature, int top_k, float top_p, float min_p,
                   float uniform) {
  const float top = highest(logits, vocab);
  if (temperature == 0) {
    const float* found = std::find(logits, logits + vocab, top);
    return found == logits + vocab ? 0 : found - logits;
  }
  static thread_local std::vector<double> weights;
  weights.resize(vocab);
  weigh(weights.data(), logits, vocab, top, temperature);
  if (min_p > 0)
    for (double& weight : weights) weight = weight >= min_p ? weight : 0.0;
  if (top_k > 0 && top_k < vocab) {
    const float kth = threshold(logits, vocab, top, 64.0f, top_k, [](int) { return 1.0; });
    keep_from(weights.data(), logits, vocab, kth);
  }
  if (top_p < 1) {
    double total = 0;
    for (const double weight : weights) total += weight;
    const float range = std::min(64.0f, 40.0f * temperature);  // weights below e^-40 move no sum
    const float lowest =
        threshold(logits, vocab, top, range, top_p * total, [&](int i) { return weights[i]; });
    keep_from(weights.data(), logits, vocab, lowest);
  }
  return draw(weights.data(), vocab, uniform);
}

}  // namespace

struct Sample {
  int64_t* out;
  const float *logits, *temperature;
  const int32_t* top_k;
  const float *top_p, *min_p, *uniform;
  int64_t rows;
  int vocab;
  int64_t row_stride;
};

SHOAL_KERNEL(sample, Sample) {
  deal(a.rows, [&](int64_t row) {
    a.out[row] = sample_row(a.logits + row * a.row_stride, a.vocab, a.temperature[row], a.top_k[row], a.top_p[row],
                            a.min_p[row], a.uniform[row]);
  });
}

}  // namespace shoal
