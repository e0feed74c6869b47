// The sums that the probe needs and what one element adds to each of them. The maths is in amft_fast/multi_tensor.py.
//
// Shared by the CPU and the CUDA build: `R` is a vector of doubles there and a double here, so that a test on a machine
// without a GPU exercises the same formulas. No torch header is included: the libraries are plain C, called through
// ctypes with raw pointers, so they build in seconds and do not depend on torch's version.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define AMFT_INLINE __host__ __device__ __forceinline__
#else
#define AMFT_INLINE inline __attribute__((always_inline))
#endif

// Raised with every change of the structs or of the order of the sums; the loader refuses a library of another version.
#define AMFT_ABI 1

// The same order as PROBE_SUMS in amft_fast/multi_tensor.py. dg is G2 - G1; p and q are the plain and the exact diagonal.
enum Sum {
  V1_V1, V1_G1, V1_DG, V2_V2, V2_G1, V2_DG, V1_V2,
  G1_G1, G1_DG, DG_DG, G2_G2,
  V1_P_G1, V1_P_DG, V2_P_G1, V2_P_DG, G2_P_G1, G2_P_DG, PG1_PG1, PDG_PDG,
  V1_Q_G1, V1_Q_DG, V2_Q_G1, V2_Q_DG, G2_Q_G1, G2_Q_DG, QG1_QG1, QDG_QDG,
  NUM_SUMS
};

// Whether a call with K v, with or without AdamW, asks for a sum; the others stay 0.
static AMFT_INLINE constexpr bool is_used(int sum, int k, bool adam) {
  const bool of_v2 =
      (sum >= V2_V2 && sum <= V1_V2) || sum == V2_P_G1 || sum == V2_P_DG || sum == V2_Q_G1 || sum == V2_Q_DG;
  return (k == 2 || !of_v2) && (adam || sum < V1_P_G1);
}

enum Dtype { F32 = 0, BF16 = 1, F64 = 2 };

// The lists, in the order of the pointers in a table row. v2 is null with one v; the last two are null without AdamW.
enum List { V1, V2, G1, G2, EXP_AVG, EXP_AVG_SQ, NUM_LISTS };

// One row of the table: the tensors that lie at one index of the lists. `dtypes` holds 4 bits per list.
struct Row {
  int64_t numel;
  int64_t dtypes;
  const void *data[NUM_LISTS];
};

static AMFT_INLINE int dtype_of(const Row &row, int list) { return (int)(row.dtypes >> (4 * list)) & 15; }

// AdamW's scalars for the step about to be taken. plain_scale = (1-b1)/bias1, exact_scale = (1-b2)/(bias1 bias2),
// inv_bias2 = 1/bias2, where bias = 1 - beta^t.
struct Adam {
  double clip, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, plain_scale, exact_scale, inv_bias2;
};

template <int K, bool ADAM, class R>
static AMFT_INLINE void accumulate(R *s, R v1, R v2, R g1, R g2, R exp_avg, R exp_avg_sq, const Adam &a) {
  const R dg = g2 - g1;
  s[V1_V1] += v1 * v1;
  s[V1_G1] += v1 * g1;
  s[V1_DG] += v1 * dg;
  if (K == 2) {
    s[V2_V2] += v2 * v2;
    s[V2_G1] += v2 * g1;
    s[V2_DG] += v2 * dg;
    s[V1_V2] += v1 * v2;
  }
  s[G1_G1] += g1 * g1;
  s[G1_DG] += g1 * dg;
  s[DG_DG] += dg * dg;
  s[G2_G2] += g2 * g2;  // summed by itself: from the three above it would cancel where G1 and dg oppose each other
  if (ADAM) {
    const R g = a.clip * g2;
    const R m = a.beta1 * exp_avg + a.one_minus_beta1 * g;
    const R vhat = (a.beta2 * exp_avg_sq + a.one_minus_beta2 * g * g) * a.inv_bias2;
    const R root = square_root(vhat);
    // Where vhat' is 0 so is g, and the exact diagonal's second term is 0/0 with the limit 0: any finite root does.
    const R safe = one_where_zero(root);
    const R denom = root + a.eps;
    const R inv = 1.0 / (safe * denom);  // one division for both 1/denom and 1/(root denom^2)
    const R inv_denom = inv * safe;
    const R p = a.plain_scale * inv_denom;
    const R q = p - a.exact_scale * m * g * inv * inv_denom;
    const R pg1 = p * g1, pdg = p * dg, qg1 = q * g1, qdg = q * dg;
    s[V1_P_G1] += v1 * pg1;
    s[V1_P_DG] += v1 * pdg;
    s[V1_Q_G1] += v1 * qg1;
    s[V1_Q_DG] += v1 * qdg;
    if (K == 2) {
      s[V2_P_G1] += v2 * pg1;
      s[V2_P_DG] += v2 * pdg;
      s[V2_Q_G1] += v2 * qg1;
      s[V2_Q_DG] += v2 * qdg;
    }
    s[G2_P_G1] += g2 * pg1;
    s[G2_P_DG] += g2 * pdg;
    s[G2_Q_G1] += g2 * qg1;
    s[G2_Q_DG] += g2 * qdg;
    s[PG1_PG1] += pg1 * pg1;
    s[PDG_PDG] += pdg * pdg;
    s[QG1_QG1] += qg1 * qg1;
    s[QDG_QDG] += qdg * qdg;
  }
}
