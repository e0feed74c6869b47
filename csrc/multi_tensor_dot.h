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

// The same order as PROBE_SUMS in amft_fast/multi_tensor.py. dg is total - g1; p and q are the plain and the exact
// diagonal.
enum Sum {
  U1_U1, U1_G1, U1_DG, U2_U2, U2_G1, U2_DG, U1_U2,
  G1_G1, G1_DG, DG_DG, TOTAL_TOTAL,
  U1_P_G1, U1_P_DG, U2_P_G1, U2_P_DG, TOTAL_P_G1, TOTAL_P_DG, PG1_PG1, PDG_PDG,
  U1_Q_G1, U1_Q_DG, U2_Q_G1, U2_Q_DG, TOTAL_Q_G1, TOTAL_Q_DG, QG1_QG1, QDG_QDG,
  NUM_SUMS
};

// Whether a call with K u, with or without AdamW, asks for a sum; the others stay 0.
static AMFT_INLINE constexpr bool is_used(int sum, int k, bool adam) {
  const bool of_u2 =
      (sum >= U2_U2 && sum <= U1_U2) || sum == U2_P_G1 || sum == U2_P_DG || sum == U2_Q_G1 || sum == U2_Q_DG;
  return (k == 2 || !of_u2) && (adam || sum < U1_P_G1);
}

enum Dtype { F32 = 0, BF16 = 1, F64 = 2 };

// The lists, in the order of the pointers in a table row. u2 is null with one u; the last two are null without AdamW.
enum List { U1, U2, G1, TOTAL, EXP_AVG, EXP_AVG_SQ, NUM_LISTS };

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
static AMFT_INLINE void accumulate(R *s, R u1, R u2, R g1, R total, R exp_avg, R exp_avg_sq, const Adam &a) {
  const R dg = total - g1;
  s[U1_U1] += u1 * u1;
  s[U1_G1] += u1 * g1;
  s[U1_DG] += u1 * dg;
  if (K == 2) {
    s[U2_U2] += u2 * u2;
    s[U2_G1] += u2 * g1;
    s[U2_DG] += u2 * dg;
    s[U1_U2] += u1 * u2;
  }
  s[G1_G1] += g1 * g1;
  s[G1_DG] += g1 * dg;
  s[DG_DG] += dg * dg;
  // Summed by itself: from the three above it would cancel where g1 and dg oppose each other.
  s[TOTAL_TOTAL] += total * total;
  if (ADAM) {
    const R g = a.clip * total;
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
    s[U1_P_G1] += u1 * pg1;
    s[U1_P_DG] += u1 * pdg;
    s[U1_Q_G1] += u1 * qg1;
    s[U1_Q_DG] += u1 * qdg;
    if (K == 2) {
      s[U2_P_G1] += u2 * pg1;
      s[U2_P_DG] += u2 * pdg;
      s[U2_Q_G1] += u2 * qg1;
      s[U2_Q_DG] += u2 * qdg;
    }
    s[TOTAL_P_G1] += total * pg1;
    s[TOTAL_P_DG] += total * pdg;
    s[TOTAL_Q_G1] += total * qg1;
    s[TOTAL_Q_DG] += total * qdg;
    s[PG1_PG1] += pg1 * pg1;
    s[PDG_PDG] += pdg * pdg;
    s[QG1_QG1] += qg1 * qg1;
    s[QDG_QDG] += qdg * qdg;
  }
}
