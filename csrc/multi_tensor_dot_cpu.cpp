// CPU driver: cuts the rows into chunks, lets threads take them, adds up the chunks' sums in their order.
//
// Deterministic: the chunks do not depend on the number of threads, each writes its own slot, and the slots are added
// in order. (The one atomic hands out chunk numbers.) Threads are started per call: 20 us each, against 20 ms for a
// pass over 50 M elements; a pool, or a second OpenMP runtime beside torch's, would cost more than it saves.
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#include <math.h>

static inline double square_root(double x) { return sqrt(x); }
static inline double one_where_zero(double x) { return x == 0.0 ? 1.0 : x; }

#include "multi_tensor_dot.h"

#define AMFT_EXPORT extern "C" __attribute__((visibility("default")))

typedef void ChunkSums(double *, const Row *, int64_t, int64_t, int, const Adam *);
extern "C" ChunkSums amft_chunk_baseline;
#ifdef AMFT_HAVE_AVX2
extern "C" ChunkSums amft_chunk_avx2;
#endif
#ifdef AMFT_HAVE_AVX512
extern "C" ChunkSums amft_chunk_avx512;
#endif

static const int64_t CHUNK = 32768;

struct Isa {
  const char *name;
  ChunkSums *sums;
};

static Isa pick_isa() {
#ifdef AMFT_HAVE_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw"))
    return {"avx512", amft_chunk_avx512};
#endif
#ifdef AMFT_HAVE_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {"avx2", amft_chunk_avx2};
#endif
  return {"baseline", amft_chunk_baseline};
}

AMFT_EXPORT int amft_abi() { return AMFT_ABI; }
AMFT_EXPORT const char *amft_isa() { return pick_isa().name; }

struct Chunk {
  const Row *row;
  int64_t begin, end;
};

// Writes NUM_SUMS doubles. `adam` is null where no diagonal is asked for. Returns 0, or 1 when memory ran out.
AMFT_EXPORT int amft_multi_tensor_dot_cpu(const Row *rows, int64_t num_rows, int num_v, const Adam *adam,
                                          int num_threads, double *out) try {
  std::vector<Chunk> chunks;
  for (const Row *row = rows; row < rows + num_rows; row++)
    for (int64_t begin = 0; begin < row->numel; begin += CHUNK)
      chunks.push_back({row, begin, begin + CHUNK < row->numel ? begin + CHUNK : row->numel});
  const int64_t num_chunks = (int64_t)chunks.size();
  std::vector<double> sums(num_chunks * NUM_SUMS);

  ChunkSums *const chunk_sums = pick_isa().sums;
  std::atomic<int64_t> next(0);
  auto work = [&] {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < num_chunks;)
      chunk_sums(&sums[i * NUM_SUMS], chunks[i].row, chunks[i].begin, chunks[i].end, num_v, adam);
  };
  std::vector<std::thread> helpers;
  helpers.reserve(num_threads > 1 ? num_threads - 1 : 0);
  try {
    for (int i = 1; i < num_threads; i++) helpers.emplace_back(work);
  } catch (const std::system_error &) {
    // The process may start no more threads: those that there are do the work.
  }
  work();
  for (std::thread &helper : helpers) helper.join();

  for (int j = 0; j < NUM_SUMS; j++) out[j] = 0;
  for (int64_t i = 0; i < num_chunks; i++)
    for (int j = 0; j < NUM_SUMS; j++) out[j] += sums[i * NUM_SUMS + j];
  return 0;
} catch (const std::bad_alloc &) {
  return 1;
}
