// CUDA: one launch for all rows, then one block that adds up what the blocks left.
//
// Deterministic: a block takes chunks blockIdx.x, blockIdx.x + gridDim.x, ..., the grid depends on the number of chunks
// alone, and both reductions are trees of fixed shape. No atomics. The result stays on the device. What a thread does
// between the reductions (`sum_chunks`) also compiles for the host, where tests run it without a GPU.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <math.h>

static __host__ __device__ __forceinline__ double square_root(double x) { return sqrt(x); }
static __host__ __device__ __forceinline__ double one_where_zero(double x) { return x == 0.0 ? 1.0 : x; }

#include "multi_tensor_dot.h"

#define AMFT_EXPORT extern "C" __attribute__((visibility("default")))

// 128 threads, because with both u and AdamW a thread needs about 150 registers: three such blocks fit on an SM, but
// only one of 256 threads. A chunk of 8192 gives each thread 64 elements, and 50 M elements 6100 blocks: five or more
// waves on 132 SMs. MAX_BLOCKS bounds the workspace at 3.5 MB.
static const int THREADS = 128;
static const int WARPS = THREADS / 32;
static const int64_t CHUNK = 8192;
static const int64_t MAX_BLOCKS = 16384;

struct Table {
  const Row *rows;
  const int64_t *first_chunk;  // num_rows + 1 entries: the chunks of row i are first_chunk[i] up to first_chunk[i + 1]
  int64_t num_rows;
};

// A row without elements has no chunks, so the row sought is the last whose first chunk is not beyond `chunk`.
static __host__ __device__ int64_t row_of_chunk(const Table &table, int64_t chunk) {
  int64_t low = 0, high = table.num_rows;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (table.first_chunk[middle] <= chunk) low = middle;
    else high = middle;
  }
  return low;
}

static AMFT_INLINE double widen(float x) { return x; }
static AMFT_INLINE double widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
static AMFT_INLINE T load_once(const T *in) {
#ifdef __CUDA_ARCH__
  return __ldcs(in);  // streaming: nothing is read twice
#else
  return *in;
#endif
}

// A thread's WIDTH elements of a tile of THREADS * WIDTH: neighbours in 128-bit loads where all lists start at 16
// bytes, else every THREADS-th element, which coalesces too. All lists are loaded before the first is used.
template <bool VECTOR, int WIDTH, class T>
static AMFT_INLINE void load(T *out, const T *tile, int thread) {
  if constexpr (VECTOR) {
    const int words = WIDTH * sizeof(T) / 16;
    static_assert(WIDTH * sizeof(T) % 16 == 0, "a vector load is a multiple of 128 bits");
    uint4 bits[words];
#pragma unroll
    for (int i = 0; i < words; i++) bits[i] = load_once((const uint4 *)(tile + thread * WIDTH) + i);
    memcpy(out, bits, sizeof bits);
  } else {
#pragma unroll
    for (int i = 0; i < WIDTH; i++) out[i] = load_once(tile + thread + i * THREADS);
  }
}

// Elements [begin, end) of a row whose lists have the dtypes U, G and S (u, gradients, AdamW's state).
template <bool VECTOR, int WIDTH, class U, class G, class S, int K, bool ADAM>
static AMFT_INLINE void sum_typed(double *s, const Row &row, int64_t begin, int64_t end, int thread, const Adam &adam) {
  const U *u1 = (const U *)row.data[U1], *u2 = (const U *)row.data[U2];
  const G *g1 = (const G *)row.data[G1], *total = (const G *)row.data[TOTAL];
  const S *m = (const S *)row.data[EXP_AVG], *q = (const S *)row.data[EXP_AVG_SQ];
  U u1_x[WIDTH], u2_x[WIDTH];
  G g1_x[WIDTH], total_x[WIDTH];
  S m_x[WIDTH], q_x[WIDTH];
  int64_t i = begin;
#pragma unroll 1
  for (; i + THREADS * WIDTH <= end; i += THREADS * WIDTH) {
    load<VECTOR, WIDTH>(u1_x, u1 + i, thread);
    if (K == 2) load<VECTOR, WIDTH>(u2_x, u2 + i, thread);
    load<VECTOR, WIDTH>(g1_x, g1 + i, thread);
    load<VECTOR, WIDTH>(total_x, total + i, thread);
    if (ADAM) load<VECTOR, WIDTH>(m_x, m + i, thread);
    if (ADAM) load<VECTOR, WIDTH>(q_x, q + i, thread);
#pragma unroll
    for (int j = 0; j < WIDTH; j++)
      accumulate<K, ADAM>(s, widen(u1_x[j]), K == 2 ? widen(u2_x[j]) : 0.0, widen(g1_x[j]), widen(total_x[j]),
                          ADAM ? widen(m_x[j]) : 0.0, ADAM ? widen(q_x[j]) : 0.0, adam);
  }
#pragma unroll 1
  for (i += thread; i < end; i += THREADS)  // what is left when no whole tile is
    accumulate<K, ADAM>(s, widen(u1[i]), K == 2 ? widen(u2[i]) : 0.0, widen(g1[i]), widen(total[i]),
                        ADAM ? widen(m[i]) : 0.0, ADAM ? widen(q[i]) : 0.0, adam);
}

template <int WIDTH, class U, class G, class S, int K, bool ADAM>
static AMFT_INLINE void sum_aligned_or_not(double *s, const Row &row, int64_t begin, int64_t end, int thread,
                                           const Adam &adam) {
  uintptr_t addresses = 0;  // views into a flat buffer, as ZeRO keeps them, need not start at 16 bytes
#pragma unroll
  for (int list = 0; list < NUM_LISTS; list++) addresses |= (uintptr_t)row.data[list];
  if (addresses % 16 == 0) sum_typed<true, WIDTH, U, G, S, K, ADAM>(s, row, begin, end, thread, adam);
  else sum_typed<false, WIDTH, U, G, S, K, ADAM>(s, row, begin, end, thread, adam);
}

static AMFT_INLINE double element(const Row &row, int list, int64_t i) {
  const int dtype = dtype_of(row, list);
  if (dtype == F32) return ((const float *)row.data[list])[i];
  if (dtype == F64) return ((const double *)row.data[list])[i];
  return widen(((const __nv_bfloat16 *)row.data[list])[i]);
}

// Any other mixture of dtypes, one element at a time.
template <int K, bool ADAM>
static AMFT_INLINE void sum_any(double *s, const Row &row, int64_t begin, int64_t end, int thread, const Adam &adam) {
#pragma unroll 1
  for (int64_t i = begin + thread; i < end; i += THREADS)
    accumulate<K, ADAM>(s, element(row, U1, i), K == 2 ? element(row, U2, i) : 0.0, element(row, G1, i),
                        element(row, TOTAL, i), ADAM ? element(row, EXP_AVG, i) : 0.0,
                        ADAM ? element(row, EXP_AVG_SQ, i) : 0.0, adam);
}

// The dtypes of u, gradients and state as one number; -1 where a pair of lists differs.
static AMFT_INLINE int mixture(const Row &row, int num_u, bool adam) {
  const int u = dtype_of(row, U1), g = dtype_of(row, G1), s = adam ? dtype_of(row, EXP_AVG) : (int)F32;
  if (num_u == 2 && dtype_of(row, U2) != u) return -1;
  if (dtype_of(row, TOTAL) != g || (adam && dtype_of(row, EXP_AVG_SQ) != s)) return -1;
  return u | g << 4 | s << 8;
}

// What thread `thread` of block `block` adds up: its part of chunks block, block + num_blocks, ...
template <int K, bool ADAM>
static AMFT_INLINE void sum_chunks(double *s, const Table &table, int64_t num_chunks, int64_t block, int64_t num_blocks,
                                   int thread, const Adam &adam) {
#pragma unroll 1
  for (int64_t chunk = block; chunk < num_chunks; chunk += num_blocks) {
    const int64_t index = row_of_chunk(table, chunk);
    const Row row = table.rows[index];
    const int64_t begin = (chunk - table.first_chunk[index]) * CHUNK;
    const int64_t end = begin + CHUNK < row.numel ? begin + CHUNK : row.numel;
    const int types = mixture(row, K, ADAM);
    if (types == (F32 | F32 << 4 | F32 << 8)) {
      sum_aligned_or_not<4, float, float, float, K, ADAM>(s, row, begin, end, thread, adam);
    } else if (types == (F32 | BF16 << 4 | F32 << 8)) {
      sum_aligned_or_not<8, float, __nv_bfloat16, float, K, ADAM>(s, row, begin, end, thread, adam);
    } else if (types == (BF16 | BF16 << 4 | F32 << 8)) {
      sum_aligned_or_not<8, __nv_bfloat16, __nv_bfloat16, float, K, ADAM>(s, row, begin, end, thread, adam);
    } else {
      sum_any<K, ADAM>(s, row, begin, end, thread, adam);
    }
  }
}

static __device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_down_sync(0xffffffffu, x, offset);
  return x;
}

// partials[sum * gridDim.x + block]
template <int K, bool ADAM>
__global__ void __launch_bounds__(THREADS, 3) sum_kernel(Table table, int64_t num_chunks, Adam adam, const double *clip,
                                                      double *partials) {
  __shared__ double shared[NUM_SUMS][WARPS];
  double s[NUM_SUMS] = {};
  if (ADAM && clip) adam.clip = *clip;
  sum_chunks<K, ADAM>(s, table, num_chunks, blockIdx.x, gridDim.x, threadIdx.x, adam);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < NUM_SUMS; i++) {
    const double x = is_used(i, K, ADAM) ? warp_sum(s[i]) : 0.0;
    if (lane == 0) shared[i][warp] = x;
  }
  __syncthreads();
  if (threadIdx.x < NUM_SUMS) {
    double x = 0;
#pragma unroll
    for (int i = 0; i < WARPS; i++) x += shared[threadIdx.x][i];
    partials[(int64_t)threadIdx.x * gridDim.x + blockIdx.x] = x;
  }
}

// One block per sum.
static __global__ void __launch_bounds__(THREADS) finish_kernel(const double *partials, int num_blocks, double *out) {
  __shared__ double shared[WARPS];
  double x = 0;
  for (int i = threadIdx.x; i < num_blocks; i += THREADS) x += partials[(int64_t)blockIdx.x * num_blocks + i];
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  if (threadIdx.x == 0) {
    double sum = 0;
#pragma unroll
    for (int i = 0; i < WARPS; i++) sum += shared[i];
    out[blockIdx.x] = sum;
  }
}

AMFT_EXPORT int amft_abi() { return AMFT_ABI; }
AMFT_EXPORT int64_t amft_cuda_chunk() { return CHUNK; }
AMFT_EXPORT int64_t amft_cuda_max_blocks() { return MAX_BLOCKS; }
AMFT_EXPORT const char *amft_cuda_error(int code) { return cudaGetErrorString((cudaError_t)code); }

// Everything but `adam` lies on `device`; `partials` has room for NUM_SUMS * min(num_chunks, MAX_BLOCKS) doubles, `out`
// for NUM_SUMS. `clip` may be null: adam->clip counts then. Returns a CUDA error code, 0 for none.
AMFT_EXPORT int amft_multi_tensor_dot_cuda(const Row *rows, const int64_t *first_chunk, int64_t num_rows,
                                           int64_t num_chunks, int num_u, const Adam *adam, const double *clip,
                                           double *partials, double *out, int device, void *stream) {
  cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  const Table table = {rows, first_chunk, num_rows};
  const int blocks = (int)(num_chunks < MAX_BLOCKS ? num_chunks : MAX_BLOCKS);
  const Adam scalars = adam ? *adam : Adam{};
  auto *kernel = adam ? (num_u == 2 ? sum_kernel<2, true> : sum_kernel<1, true>)
                      : (num_u == 2 ? sum_kernel<2, false> : sum_kernel<1, false>);
  kernel<<<blocks, THREADS, 0, (cudaStream_t)stream>>>(table, num_chunks, scalars, clip, partials);
  error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  finish_kernel<<<NUM_SUMS, THREADS, 0, (cudaStream_t)stream>>>(partials, blocks, out);
  return cudaGetLastError();
}

#ifdef AMFT_HOST_TEST
// The same work on the host, one thread after the other: everything but the launch and the two reductions.
AMFT_EXPORT void amft_multi_tensor_dot_emulated(const Row *rows, const int64_t *first_chunk, int64_t num_rows,
                                                int64_t num_chunks, int num_u, const Adam *adam, double *out) {
  const Table table = {rows, first_chunk, num_rows};
  const int64_t blocks = num_chunks < MAX_BLOCKS ? num_chunks : MAX_BLOCKS;
  const Adam scalars = adam ? *adam : Adam{};
  for (int i = 0; i < NUM_SUMS; i++) out[i] = 0;
  for (int64_t block = 0; block < blocks; block++)
    for (int thread = 0; thread < THREADS; thread++) {
      if (adam && num_u == 2) sum_chunks<2, true>(out, table, num_chunks, block, blocks, thread, scalars);
      else if (adam) sum_chunks<1, true>(out, table, num_chunks, block, blocks, thread, scalars);
      else if (num_u == 2) sum_chunks<2, false>(out, table, num_chunks, block, blocks, thread, scalars);
      else sum_chunks<1, false>(out, table, num_chunks, block, blocks, thread, scalars);
    }
}
#endif
