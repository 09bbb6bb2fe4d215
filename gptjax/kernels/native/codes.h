// Kernels in few bits as `nn.quantized` stores them: rows of codes in planes, w = scale * (code - zero).
//
// Codes are read in blocks of 32, and never leave the registers: a block becomes 32 bytes, and those are multiplied
// with 8-bit inputs as they are or widened to floats. GPTJAX_PLAIN leaves out the instructions of x86, for tests.

#ifndef GPTJAX_KERNELS_NATIVE_CODES_H_
#define GPTJAX_KERNELS_NATIVE_CODES_H_

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__) && !defined(GPTJAX_PLAIN)
#include <immintrin.h>
#define GPTJAX_AVX2 1
#endif

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
inline auto Total(const Vector& values) {
  constexpr int kNum = sizeof(Vector) / sizeof(values[0]);
  std::remove_cv_t<std::remove_reference_t<decltype(values[0])>> lanes[kNum];
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

}  // namespace

#endif  // GPTJAX_KERNELS_NATIVE_CODES_H_
