// Products with kernels in few bits, and the float values of such kernels, for XLA:CPU.
//
// Rows, codes, planes, scales and zeros are those of `nn.quantized`: w = scale * (code - zero), in blocks of 32 codes.
// Codes never leave the registers: a block becomes 32 bytes, and those are multiplied with 8-bit inputs as they are or
// widened to floats.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

#if defined(__AVX2__) && !defined(GPTJAX_PLAIN)
#include <immintrin.h>
#define GPTJAX_AVX2 1
#endif

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kBlock = 32;

typedef uint8_t U8x32 __attribute__((vector_size(32)));
typedef uint32_t U32x8 __attribute__((vector_size(32)));
typedef uint64_t U64x4 __attribute__((vector_size(32)));
typedef int8_t I8x16 __attribute__((vector_size(16)));
typedef uint8_t U8x16 __attribute__((vector_size(16)));
typedef int32_t I32x8 __attribute__((vector_size(32)));
typedef float F32x8 __attribute__((vector_size(32)));
typedef int32_t I32x16 __attribute__((vector_size(64)));
typedef float F32x16 __attribute__((vector_size(64)));

template <typename T>
inline T Load(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

// ---- codes

// 32 codes of one plane: byte j of its 4 * kBits holds codes j, j + 4 * kBits, ... from its low bits up.
template <int kBits>
inline U8x32 Plane(const uint8_t* bytes) {
  if constexpr (kBits == 8) {
    return Load<U8x32>(bytes);
  } else if constexpr (kBits == 4) {
    const uint64_t a = Load<uint64_t>(bytes), b = Load<uint64_t>(bytes + 8);
    const U64x4 both = U64x4{a, b, a, b} >> U64x4{0, 0, 4, 4};
    return (U8x32)(both & 0x0F0F0F0F0F0F0F0FULL);
  } else if constexpr (kBits == 2) {
    const uint64_t a = Load<uint64_t>(bytes);
    return (U8x32)((U64x4{a, a, a, a} >> U64x4{0, 2, 4, 6}) & 0x0303030303030303ULL);
  } else {
    const uint32_t a = Load<uint32_t>(bytes);
    return (U8x32)((U32x8{a, a, a, a, a, a, a, a} >> U32x8{0, 1, 2, 3, 4, 5, 6, 7}) & 0x01010101U);
  }
}

template <int kBits>
struct Codes {
  static constexpr int kLow = kBits == 3 ? 2 : kBits == 8 ? 8 : kBits >= 4 ? 4 : kBits;
  static constexpr int kHigh = kBits - kLow;

  static inline U8x32 Get(const uint8_t* low, const uint8_t* high, int64_t block) {
    U8x32 codes = Plane<kLow>(low + block * 4 * kLow);
    if constexpr (kHigh > 0) {
      // No bit of a byte reaches the next one.
      codes |= (U8x32)((U64x4)Plane<kHigh>(high + block * 4 * kHigh) << kLow);
    }
    return codes;
  }
};

inline I8x16 Half(U8x32 codes, int half) {
  I8x16 halves[2];
  std::memcpy(halves, &codes, sizeof(codes));
  return halves[half];
}

inline F32x16 Widen(I8x16 bytes) {
#if defined(__AVX512F__) && defined(GPTJAX_AVX2)
  return (F32x16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)bytes));
#elif defined(GPTJAX_AVX2)
  union { F32x16 all; __m256 half[2]; } out;
  out.half[0] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32((__m128i)bytes));
  out.half[1] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128((__m128i)bytes, 8)));
  return out.all;
#else
  return __builtin_convertvector(bytes, F32x16);
#endif
}

// code - zero as floats, exactly; the difference of two codes of 8 bits needs a ninth.
template <int kBits>
inline void Centred(U8x32 codes, uint8_t zero, F32x16 out[2]) {
  if constexpr (kBits == 8) {
    codes ^= 0x80;
    out[0] = Widen(Half(codes, 0)) + (128.0f - zero);
    out[1] = Widen(Half(codes, 1)) + (128.0f - zero);
  } else {
    codes -= zero;
    out[0] = Widen(Half(codes, 0));
    out[1] = Widen(Half(codes, 1));
  }
}

// sums[i] += the products of four neighbours; which four is of no matter to their total.
inline I32x8 Dot(I32x8 sums, U8x32 codes, U8x32 inputs) {
#if defined(GPTJAX_AVX2) && defined(__AVX512VNNI__) && defined(__AVX512VL__)
  return (I32x8)_mm256_dpbusd_epi32((__m256i)sums, (__m256i)codes, (__m256i)inputs);
#elif defined(GPTJAX_AVX2)
  // Not maddubs: two products of 8 bits each do not fit in the 16 that it adds them in.
  const __m256i c = (__m256i)codes, x = (__m256i)inputs;
  const __m256i low = _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm256_castsi256_si128(c)),
                                        _mm256_cvtepi8_epi16(_mm256_castsi256_si128(x)));
  const __m256i high = _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm256_extracti128_si256(c, 1)),
                                         _mm256_cvtepi8_epi16(_mm256_extracti128_si256(x, 1)));
  return sums + (I32x8)low + (I32x8)high;
#else
  int8_t x[kBlock];
  std::memcpy(x, &inputs, sizeof(x));
  for (int i = 0; i < kBlock; ++i) sums[i / 4] += int32_t{codes[i]} * x[i];
  return sums;
#endif
}

inline F32x8 ToFloat(I32x8 values) {
#if defined(GPTJAX_AVX2)
  return (F32x8)_mm256_cvtepi32_ps((__m256i)values);
#else
  return __builtin_convertvector(values, F32x8);
#endif
}

template <typename Vector>
inline float Total(Vector values) {
  constexpr int kNum = sizeof(Vector) / sizeof(float);
  float lanes[kNum];
  std::memcpy(lanes, &values, sizeof(values));
  for (int width = kNum / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

inline float HalfToFloat(uint16_t half) {
#if defined(GPTJAX_AVX2) && defined(__F16C__)
  return _cvtsh_ss(half);
#else
  const uint32_t rest = half & 0x7FFFu;
  const bool finite = rest < 0x7C00u;
  const uint32_t bits = finite ? rest << 13 : 0x7F800000u | (rest & 0x3FFu) << 13;
  const float value = Load<float>(&bits) * (finite ? 0x1p112f : 1.0f);  // moves the exponent, of subnormals too
  return half & 0x8000u ? -value : value;
#endif
}

// ---- a kernel

struct Kernel {
  const uint8_t* low;
  const uint8_t* high;
  const uint8_t* scale;
  const uint8_t* zero;  // null: the middle code
  int64_t rows, inputs, groups, low_bytes, high_bytes;
  bool half_scales, is_signed;

  int64_t blocks() const { return (inputs + kBlock - 1) / kBlock; }
  int64_t blocks_of_group() const { return groups == 1 ? blocks() : inputs / groups / kBlock; }
  int64_t padded() const { return blocks() * kBlock; }
  float Scale(int64_t row, int64_t group) const {
    const int64_t at = row * groups + group;
    return half_scales ? HalfToFloat(Load<uint16_t>(scale + 2 * at)) : Load<float>(scale + 4 * at);
  }
};

// One row; a last block that is not whole (of 8 bits only) is read from a copy.
template <int kBits>
class Row {
 public:
  Row(const Kernel& kernel, int64_t row)
      : low_(kernel.low + row * kernel.low_bytes),
        high_(kernel.high == nullptr ? nullptr : kernel.high + row * kernel.high_bytes),
        zero_(kernel.zero == nullptr ? nullptr : kernel.zero + row * kernel.groups),
        whole_(kernel.inputs / kBlock),
        rest_(kernel.inputs % kBlock),
        is_signed_(kernel.is_signed) {}

  inline U8x32 Get(int64_t block) const {
    if (kBits == 8 && block == whole_) {
      uint8_t bytes[kBlock] = {0};
      std::memcpy(bytes, low_ + block * kBlock, rest_);
      return Signless(Load<U8x32>(bytes));
    }
    return Signless(Codes<kBits>::Get(low_, high_, block));
  }
  inline uint8_t Zero(int64_t group) const { return zero_ == nullptr ? uint8_t{1} << (kBits - 1) : zero_[group]; }

 private:
  inline U8x32 Signless(U8x32 codes) const { return kBits == 8 && is_signed_ ? codes ^ 0x80 : codes; }

  const uint8_t *low_, *high_, *zero_;
  int64_t whole_, rest_;
  bool is_signed_;
};

// ---- threads

// Calls work(begin, end) on parts of [0, count) in the pool's threads and this one. This one takes whatever nobody has
// begun, so it never waits for a thread that is not running: in a pool of one thread, or of waiting ones, it does all.
template <typename Work>
void InParallel(ffi::ThreadPool& pool, int64_t count, int64_t cost, const Work& work) {
  constexpr int64_t kLeast = 1 << 17;  // multiplications that take as long as waking a thread
  const int64_t threads = pool.num_threads();
  const int64_t parts = std::min({count, cost / kLeast, 4 * threads});
  if (threads < 2 || parts < 2) return work(0, count);
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto shared = std::make_shared<Shared>();
  const Work* borrowed = &work;  // alive while any part is not done
  auto take = [shared, borrowed, parts, count] {
    for (int64_t part; (part = shared->next.fetch_add(1)) < parts;) {
      (*borrowed)(part * count / parts, (part + 1) * count / parts);
      shared->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t i = 1; i < std::min(threads, parts); ++i) pool.Schedule(decltype(take)(take));  // a copy: it cannot schedule what it does not own
  take();
  for (int64_t spins = 0; shared->done.load(std::memory_order_acquire) < parts; ++spins) {
    if (spins > 1000) std::this_thread::yield();
  }
}

// ---- products

template <int kBits, int kRows>
void FloatProduct(const Kernel& kernel, const float* x, float* y, int64_t begin, int64_t end) {
  const int64_t stride = kernel.padded(), of_group = kernel.blocks_of_group();
  for (int64_t row = begin; row < end; ++row) {
    const Row<kBits> codes(kernel, row);
    F32x16 sums[kRows][2] = {};
    for (int64_t group = 0; group < kernel.groups; ++group) {
      const float scale = kernel.Scale(row, group);
      const uint8_t zero = codes.Zero(group);
      for (int64_t block = group * of_group; block < (group + 1) * of_group; ++block) {
        F32x16 w[2];
        Centred<kBits>(codes.Get(block), zero, w);
        w[0] *= scale;
        w[1] *= scale;
        for (int r = 0; r < kRows; ++r) {
          const float* at = x + r * stride + block * kBlock;
          sums[r][0] += w[0] * Load<F32x16>(at);
          sums[r][1] += w[1] * Load<F32x16>(at + 16);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) y[r * kernel.rows + row] = Total(sums[r][0] + sums[r][1]);
  }
}

// Inputs rounded to 8 bits: codes, one scale for each row, and the codes' sum over each group.
struct Rounded {
  std::vector<int8_t> codes;
  std::vector<float> scales;
  std::vector<int32_t> sums;
};

template <int kBits, int kRows>
void Int8Product(const Kernel& kernel, const Rounded& x, int64_t first, float* y, int64_t begin, int64_t end) {
  const int64_t stride = kernel.padded(), of_group = kernel.blocks_of_group();
  const int8_t* inputs = x.codes.data() + first * stride;
  const int32_t* input_sums = x.sums.data() + first * kernel.groups;
  for (int64_t row = begin; row < end; ++row) {
    const Row<kBits> codes(kernel, row);
    F32x8 sums[kRows] = {};
    for (int64_t group = 0; group < kernel.groups; ++group) {
      const int32_t zero = codes.Zero(group);
      I32x8 dots[kRows];
      for (int r = 0; r < kRows; ++r) dots[r] = I32x8{-zero * input_sums[r * kernel.groups + group]};
      for (int64_t block = group * of_group; block < (group + 1) * of_group; ++block) {
        const U8x32 w = codes.Get(block);
        for (int r = 0; r < kRows; ++r) dots[r] = Dot(dots[r], w, Load<U8x32>(inputs + r * stride + block * kBlock));
      }
      const float scale = kernel.Scale(row, group);
      for (int r = 0; r < kRows; ++r) {
        // Sums over a whole row lie apart by more than a float's digits until they are one.
        if (kernel.groups == 1) dots[r] = I32x8{dots[r][0] + dots[r][1] + dots[r][2] + dots[r][3] +
                                                dots[r][4] + dots[r][5] + dots[r][6] + dots[r][7]};
        sums[r] += ToFloat(dots[r]) * scale;
      }
    }
    for (int r = 0; r < kRows; ++r) y[r * kernel.rows + row] = Total(sums[r]) * x.scales[first + r];
  }
}

// As `few_bits._rounded`: to the nearest of -127 to 127 times the scale, ties to even.
void Round(const float* x, int64_t inputs, int64_t padded, int64_t groups, int64_t row, Rounded& out) {
  uint32_t largest = 0;  // of the bits, which order as the absolute values do
  for (int64_t i = 0; i < inputs; ++i) largest = std::max(largest, Load<uint32_t>(x + i) & 0x7FFFFFFFu);
  const float scale = Load<float>(&largest) / 127.0f, divisor = scale == 0.0f ? 1.0f : scale;
  int8_t* codes = out.codes.data() + row * padded;
  constexpr float kRounds = 0x1.8p23f;  // has no digits after the point
  for (int64_t i = 0; i < inputs; ++i) {
    codes[i] = static_cast<int8_t>(static_cast<int32_t>((x[i] / divisor + kRounds) - kRounds));
  }
  out.scales[row] = scale;
  const int64_t of_group = padded / groups;
  for (int64_t group = 0; group < groups; ++group) {
    int32_t sum = 0;
    for (int64_t i = group * of_group; i < (group + 1) * of_group; ++i) sum += codes[i];
    out.sums[row * groups + group] = sum;
  }
}

template <int kBits>
void FloatRows(ffi::ThreadPool& pool, const Kernel& kernel, const float* x, int64_t num, float* y) {
  InParallel(pool, kernel.rows, num * kernel.rows * kernel.inputs, [&](int64_t begin, int64_t end) {
    int64_t m = 0;
    const int64_t stride = kernel.padded();
    for (; m + 4 <= num; m += 4) FloatProduct<kBits, 4>(kernel, x + m * stride, y + m * kernel.rows, begin, end);
    for (; m < num; ++m) FloatProduct<kBits, 1>(kernel, x + m * stride, y + m * kernel.rows, begin, end);
  });
}

template <int kBits>
void Int8Rows(ffi::ThreadPool& pool, const Kernel& kernel, const Rounded& x, int64_t num, float* y) {
  InParallel(pool, kernel.rows, num * kernel.rows * kernel.inputs / 2, [&](int64_t begin, int64_t end) {
    constexpr int64_t kTogether = 16;  // rows of the kernel that stay in the cache for all inputs
    for (int64_t from = begin; from < end; from += kTogether) {
      const int64_t to = std::min(end, from + kTogether);
      int64_t m = 0;
      for (; m + 8 <= num; m += 8) Int8Product<kBits, 8>(kernel, x, m, y + m * kernel.rows, from, to);
      for (; m + 2 <= num; m += 2) Int8Product<kBits, 2>(kernel, x, m, y + m * kernel.rows, from, to);
      for (; m < num; ++m) Int8Product<kBits, 1>(kernel, x, m, y + m * kernel.rows, from, to);
    }
  });
}

template <int kBits>
void Values(ffi::ThreadPool& pool, const Kernel& kernel, float* y) {
  InParallel(pool, kernel.rows, kernel.rows * kernel.inputs, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const Row<kBits> codes(kernel, row);
      const int64_t of_group = kernel.blocks_of_group();
      for (int64_t block = 0; block < kernel.blocks(); ++block) {
        const int64_t group = block / of_group;
        F32x16 w[2];
        Centred<kBits>(codes.Get(block), codes.Zero(group), w);
        const float scale = kernel.Scale(row, group);
        w[0] *= scale;
        w[1] *= scale;
        const int64_t at = block * kBlock;
        std::memcpy(y + row * kernel.inputs + at, w, sizeof(float) * std::min(kBlock, kernel.inputs - at));
      }
    }
  });
}

// ---- handlers

template <typename Call>
ffi::Error ForBits(int64_t bits, const Call& call) {
  switch (bits) {
    case 2: call(std::integral_constant<int, 2>()); break;
    case 3: call(std::integral_constant<int, 3>()); break;
    case 4: call(std::integral_constant<int, 4>()); break;
    case 5: call(std::integral_constant<int, 5>()); break;
    case 6: call(std::integral_constant<int, 6>()); break;
    case 8: call(std::integral_constant<int, 8>()); break;
    default: return ffi::Error::InvalidArgument("expected 2, 3, 4, 5, 6 or 8 bits");
  }
  return ffi::Error::Success();
}

ffi::ErrorOr<Kernel> Read(ffi::AnyBuffer scale, ffi::AnyBuffer low, ffi::RemainingArgs rest, int64_t bits) {
  Kernel kernel{};
  kernel.low = static_cast<const uint8_t*>(low.untyped_data());
  kernel.scale = static_cast<const uint8_t*>(scale.untyped_data());
  kernel.half_scales = scale.element_type() == ffi::F16;
  kernel.is_signed = low.element_type() == ffi::S8;
  kernel.rows = low.dimensions()[0];
  kernel.low_bytes = low.dimensions()[1];
  kernel.groups = scale.dimensions()[1];
  const bool has_high = bits == 3 || bits == 5 || bits == 6;
  kernel.inputs = kernel.low_bytes * 8 / (bits == 3 ? 2 : bits == 5 || bits == 6 ? 4 : bits);
  if (rest.size() > has_high + size_t{1} || rest.size() < has_high) {
    return ffi::Unexpected(ffi::Error::InvalidArgument("expected the planes of the codes and at most zeros"));
  }
  if (has_high) {
    auto high = rest.get<ffi::AnyBuffer>(0);
    if (high.has_error()) return ffi::Unexpected(high.error());
    kernel.high = static_cast<const uint8_t*>(high->untyped_data());
    kernel.high_bytes = high->dimensions()[1];
  }
  if (rest.size() > has_high) {
    auto zero = rest.get<ffi::AnyBuffer>(has_high);
    if (zero.has_error()) return ffi::Unexpected(zero.error());
    kernel.zero = static_cast<const uint8_t*>(zero->untyped_data());
  }
  if ((bits != 8 && kernel.inputs % kBlock) || (kernel.groups > 1 && kernel.inputs % (kernel.groups * kBlock))) {
    return ffi::Unexpected(ffi::Error::InvalidArgument("expected groups of whole blocks of 32 codes"));
  }
  return kernel;
}

// y[m, n] = sum_k x[m, k] w[n, k]
ffi::Error Product(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer scale, ffi::AnyBuffer low,
                   ffi::RemainingArgs rest, ffi::ResultBuffer<ffi::F32> y, int64_t bits, bool rounds) {
  auto kernel = Read(scale, low, rest, bits);
  if (kernel.has_error()) return kernel.error();
  const int64_t num = x.dimensions()[0], inputs = kernel->inputs, padded = kernel->padded();
  if (x.dimensions()[1] != inputs) return ffi::Error::InvalidArgument("expected as many inputs as codes in a row");
  const float* from = x.typed_data();
  if (rounds) {
    Rounded rounded{std::vector<int8_t>(num * padded), std::vector<float>(num),
                    std::vector<int32_t>(num * kernel->groups)};
    InParallel(pool, num, num * inputs * 4, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        Round(from + row * inputs, inputs, padded, kernel->groups, row, rounded);
      }
    });
    return ForBits(bits, [&](auto kBits) { Int8Rows<kBits>(pool, *kernel, rounded, num, y->typed_data()); });
  }
  std::vector<float> copy;
  if (padded != inputs) {
    copy.resize(num * padded);
    for (int64_t row = 0; row < num; ++row) {
      std::memcpy(copy.data() + row * padded, from + row * inputs, inputs * sizeof(float));
    }
    from = copy.data();
  }
  return ForBits(bits, [&](auto kBits) { FloatRows<kBits>(pool, *kernel, from, num, y->typed_data()); });
}

// y[n, k] = w[n, k]
ffi::Error Dequantize(ffi::ThreadPool pool, ffi::AnyBuffer scale, ffi::AnyBuffer low, ffi::RemainingArgs rest,
                      ffi::ResultBuffer<ffi::F32> y, int64_t bits) {
  auto kernel = Read(scale, low, rest, bits);
  if (kernel.has_error()) return kernel.error();
  return ForBits(bits, [&](auto kBits) { Values<kBits>(pool, *kernel, y->typed_data()); });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(gptjax_few_bits_product, Product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("bits")
                                  .Attr<bool>("rounds"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(gptjax_few_bits_dequantize, Dequantize,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("bits"));
