// CPU: the sums over one chunk of one row. Compiled once per instruction set (setup.py), with AMFT_ISA naming it;
// multi_tensor_dot_cpu.cpp picks one at run time. No standard C++ header here: an inline function of one,
// compiled for AVX-512 and merged by the linker, would crash a machine without it.
#include <stdint.h>
#include <string.h>

// As wide as a register: with eight lanes on AVX2, GCC 12 splits every operation badly and takes five times as long.
#if defined(__AVX512F__)
#define LANES 8
#elif defined(__AVX2__)
#define LANES 4
#else
#define LANES 2
#endif
typedef double Lanes __attribute__((vector_size(8 * LANES)));
typedef float Floats __attribute__((vector_size(4 * LANES)));

static inline __attribute__((always_inline)) Lanes square_root(Lanes x) {
  Lanes y;
  for (int i = 0; i < LANES; i++) y[i] = __builtin_sqrt(x[i]);
  return y;
}
static inline __attribute__((always_inline)) Lanes one_where_zero(Lanes x) { return x == 0.0 ? Lanes{} + 1.0 : x; }

#include "multi_tensor_dot.h"

static const int64_t PREFETCH = 1024;  // elements ahead

#define AMFT_CONCAT(a, b) a##b
#define AMFT_NAME(isa) AMFT_CONCAT(amft_chunk_, isa)

static AMFT_INLINE Lanes load(const float *x) {
  Floats y;
  memcpy(&y, x, sizeof y);
  return __builtin_convertvector(y, Lanes);
}
static AMFT_INLINE Lanes load(const double *x) {
  Lanes y;
  memcpy(&y, x, sizeof y);
  return y;
}

template <class T, int K, bool ADAM>
static void sum_block(Lanes *sums, const T *const *data, int64_t n, const Adam &adam) {
  Lanes s[NUM_SUMS];
  memcpy(s, sums, sizeof s);
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    // The hardware's own prefetch leaves one thread at 31 GB/s of its 38 (EPYC 9005). Beyond the end it does no harm.
    for (int list = 0; list < NUM_LISTS; list++)
      if ((list != U2 || K == 2) && (list < EXP_AVG || ADAM)) __builtin_prefetch(data[list] + i + PREFETCH);
    accumulate<K, ADAM>(s, load(data[U1] + i), K == 2 ? load(data[U2] + i) : Lanes{}, load(data[G1] + i),
                        load(data[TOTAL] + i), ADAM ? load(data[EXP_AVG] + i) : Lanes{},
                        ADAM ? load(data[EXP_AVG_SQ] + i) : Lanes{}, adam);
  }
  if (i < n) {  // padded with zeros, which add nothing to any sum
    T tail[NUM_LISTS][LANES] = {};
    for (int list = 0; list < NUM_LISTS; list++)
      if (data[list]) memcpy(tail[list], data[list] + i, (n - i) * sizeof(T));
    accumulate<K, ADAM>(s, load(tail[U1]), load(tail[U2]), load(tail[G1]), load(tail[TOTAL]), load(tail[EXP_AVG]),
                        load(tail[EXP_AVG_SQ]), adam);
  }
  memcpy(sums, s, sizeof s);
}

template <class T>
static void convert(T *out, const void *data, int dtype, int64_t first, int64_t n) {
  if (dtype == F64) {
    for (int64_t i = 0; i < n; i++) out[i] = (T)((const double *)data)[first + i];
  } else if (dtype == F32) {
    for (int64_t i = 0; i < n; i++) out[i] = ((const float *)data)[first + i];
  } else {
    const uint16_t *in = (const uint16_t *)data + first;
    for (int64_t i = 0; i < n; i++) {
      const uint32_t bits = (uint32_t)in[i] << 16;
      float x;
      memcpy(&x, &bits, sizeof x);
      out[i] = x;
    }
  }
}

// Lists that are not of type T pass through a buffer in L1, so that one kernel serves every mixture of dtypes.
template <class T, int K, bool ADAM>
static void sum_chunk(Lanes *sums, const Row &row, int64_t begin, int64_t end, const Adam &adam) {
  const int own = sizeof(T) == 4 ? F32 : F64;
  const int64_t block = 512;  // 6 lists x 512 x 8 bytes = 24 KB, within L1; a multiple of LANES
  T buffer[NUM_LISTS][block];
  bool mixed = false;
  for (int list = 0; list < NUM_LISTS; list++) mixed |= row.data[list] && dtype_of(row, list) != own;
  const int64_t stride = mixed ? block : end - begin;
  for (int64_t first = begin; first < end; first += stride) {
    const int64_t n = end - first < stride ? end - first : stride;
    const T *data[NUM_LISTS];
    for (int list = 0; list < NUM_LISTS; list++) {
      const int dtype = dtype_of(row, list);
      data[list] = 0;
      if (!row.data[list]) continue;
      data[list] = (const T *)row.data[list] + first;
      if (dtype == own) continue;
      convert(buffer[list], row.data[list], dtype, first, n);
      data[list] = buffer[list];
    }
    sum_block<T, K, ADAM>(sums, data, n, adam);
  }
}

// Writes the NUM_SUMS sums over elements [begin, end) of a row.
extern "C" void AMFT_NAME(AMFT_ISA)(double *out, const Row *row, int64_t begin, int64_t end, int num_u,
                                    const Adam *adam) {
  Lanes sums[NUM_SUMS] = {};
  bool wide = false;
  for (int list = 0; list < NUM_LISTS; list++) wide |= row->data[list] && dtype_of(*row, list) == F64;
  const Adam none = {};
  if (wide) {
    if (adam) (num_u == 2 ? sum_chunk<double, 2, true> : sum_chunk<double, 1, true>)(sums, *row, begin, end, *adam);
    else (num_u == 2 ? sum_chunk<double, 2, false> : sum_chunk<double, 1, false>)(sums, *row, begin, end, none);
  } else {
    if (adam) (num_u == 2 ? sum_chunk<float, 2, true> : sum_chunk<float, 1, true>)(sums, *row, begin, end, *adam);
    else (num_u == 2 ? sum_chunk<float, 2, false> : sum_chunk<float, 1, false>)(sums, *row, begin, end, none);
  }
  for (int i = 0; i < NUM_SUMS; i++) {
    out[i] = 0;
    for (int lane = 0; lane < LANES; lane++) out[i] += sums[i][lane];
  }
}
