// Products with kernels in few bits, and the float values of such kernels, for XLA:CPU.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#include "codes.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

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
        if (kernel.groups == 1) dots[r] = I32x8{Total(dots[r])};
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

// Many inputs times rows of one scale each: 4 by 4 sums at a time, of codes that are unpacked once.
constexpr int64_t kTile = 4, kUnpacked = 16;

typedef int32_t I32x4 __attribute__((vector_size(16)));
typedef float F32x4 __attribute__((vector_size(16)));

// out[m][n] = inputs[m] . codes[n]
inline void Int8Tile(const uint8_t* codes, const int8_t* inputs, int64_t stride, I32x4 out[kTile]) {
#if defined(GPTJAX_AVX2) && defined(__AVX512VNNI__)
  __m512i sums[kTile][kTile] = {};
  for (int64_t k = 0; k < stride; k += 64) {
    __m512i w[kTile];
    for (int n = 0; n < kTile; ++n) w[n] = _mm512_loadu_si512(codes + n * stride + k);
    for (int m = 0; m < kTile; ++m) {
      const __m512i x = _mm512_loadu_si512(inputs + m * stride + k);
      for (int n = 0; n < kTile; ++n) sums[m][n] = _mm512_dpbusd_epi32(sums[m][n], w[n], x);
    }
  }
  for (int m = 0; m < kTile; ++m) {
    __m256i halves[kTile];
    for (int n = 0; n < kTile; ++n) {
      halves[n] = _mm256_add_epi32(_mm512_castsi512_si256(sums[m][n]), _mm512_extracti64x4_epi64(sums[m][n], 1));
    }
    const __m256i all = _mm256_hadd_epi32(_mm256_hadd_epi32(halves[0], halves[1]),
                                          _mm256_hadd_epi32(halves[2], halves[3]));
    out[m] = (I32x4)_mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  }
#else
  for (int m = 0; m < kTile; ++m) {
    for (int n = 0; n < kTile; ++n) {
      I32x8 sums = {};
      for (int64_t k = 0; k < stride; k += kBlock) {
        sums = Dot(sums, Load<U8x32>(codes + n * stride + k), Load<U8x32>(inputs + m * stride + k));
      }
      out[m][n] = Total(sums);
    }
  }
#endif
}

// There must be kUnpacked rows and kTile inputs; the last tiles lie over those before where they would not be full.
template <int kBits>
void Int8Tiles(const Kernel& kernel, const Rounded& x, int64_t num, float* y, int64_t begin, int64_t end) {
  const int64_t stride = kernel.padded();
  std::vector<uint8_t> codes(kUnpacked * stride);
  for (int64_t next = begin; next < end; next += kUnpacked) {
    const int64_t row = std::min(next, end - kUnpacked);
    int32_t zero[kUnpacked];
    float scale[kUnpacked];
    for (int64_t n = 0; n < kUnpacked; ++n) {
      const Row<kBits> from(kernel, row + n);
      zero[n] = from.Zero(0);
      scale[n] = kernel.Scale(row + n, 0);
      for (int64_t block = 0; block < kernel.blocks(); ++block) {
        const U8x32 bytes = from.Get(block);
        std::memcpy(codes.data() + n * stride + block * kBlock, &bytes, kBlock);
      }
    }
    for (int64_t after = 0; after < num; after += kTile) {
      const int64_t first = std::min(after, num - kTile);
      for (int64_t n = 0; n < kUnpacked; n += kTile) {
        I32x4 sums[kTile];
        Int8Tile(codes.data() + n * stride, x.codes.data() + first * stride, stride, sums);
        for (int64_t m = first; m < first + kTile; ++m) {
          const I32x4 sum = sums[m - first] - Load<I32x4>(zero + n) * x.sums[m];
          const F32x4 values = __builtin_convertvector(sum, F32x4) * Load<F32x4>(scale + n) * x.scales[m];
          std::memcpy(y + m * kernel.rows + row + n, &values, sizeof(values));
        }
      }
    }
  }
}

template <int kBits>
void Int8Rows(ffi::ThreadPool& pool, const Kernel& kernel, const Rounded& x, int64_t num, float* y) {
  InParallel(pool, kernel.rows, num * kernel.rows * kernel.inputs / 2, [&](int64_t begin, int64_t end) {
    const bool whole_registers = kernel.groups == 1 && kernel.padded() % 64 == 0;
    if (whole_registers && num >= 2 * kTile && end - begin >= kUnpacked) {
      return Int8Tiles<kBits>(kernel, x, num, y, begin, end);
    }
    int64_t m = 0;
    for (; m + 8 <= num; m += 8) Int8Product<kBits, 8>(kernel, x, m, y + m * kernel.rows, begin, end);
    for (; m + 2 <= num; m += 2) Int8Product<kBits, 2>(kernel, x, m, y + m * kernel.rows, begin, end);
    for (; m < num; ++m) Int8Product<kBits, 1>(kernel, x, m, y + m * kernel.rows, begin, end);
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
