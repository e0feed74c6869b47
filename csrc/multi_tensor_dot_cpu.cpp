// CPU driver: cuts the rows into chunks, lets threads take them, adds up the chunks' sums in their order.
//
// Deterministic: the chunks do not depend on the number of threads, each writes its own slot, and the slots are added
// in order. (The atomics hand out and count chunks.) Threads are started per call: 20 us each, against 20 ms for a pass
// over 50 M elements; a pool, or a second OpenMP runtime beside torch's, would cost more than it saves. They are
// detached and the caller waits for the chunks, not for them: a busy machine may give one its first slice 10 ms late.
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include <math.h>
#include <stdlib.h>
#include <string.h>

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

// The widest that the machine has, or the one that AMFT_CPU_ISA names if it has that: for tests, and for the same bits
// on machines of different kinds.
static Isa pick_isa() {
  const char *forced = getenv("AMFT_CPU_ISA");
  const auto wanted = [forced](const char *name) { return !forced || !*forced || !strcmp(forced, name); };
#ifdef AMFT_HAVE_AVX512
  if (wanted("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw"))
    return {"avx512", amft_chunk_avx512};
#endif
#ifdef AMFT_HAVE_AVX2
  if (wanted("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return {"avx2", amft_chunk_avx2};
#endif
  (void)wanted;
  return {"baseline", amft_chunk_baseline};
}

AMFT_EXPORT int amft_abi() { return AMFT_ABI; }
AMFT_EXPORT const char *amft_isa() { return pick_isa().name; }

struct Chunk {
  const Row *row;
  int64_t begin, end;
};

// One call's work. Shared with the threads, so that one that comes too late still finds that nothing is left.
struct Work {
  std::vector<Chunk> chunks;
  std::vector<double> sums;
  int num_u;
  const Adam *adam;
  ChunkSums *chunk_sums;
  std::atomic<int64_t> next{0}, done{0};
  std::mutex mutex;
  std::condition_variable all_done;

  int64_t size() const { return (int64_t)chunks.size(); }

  void take_chunks() {
    for (int64_t i; (i = next.fetch_add(1)) < size();) {
      chunk_sums(&sums[i * NUM_SUMS], chunks[i].row, chunks[i].begin, chunks[i].end, num_u, adam);
      if (done.fetch_add(1) + 1 == size()) {
        std::lock_guard<std::mutex> lock(mutex);
        all_done.notify_one();
      }
    }
  }

  void wait() {
    std::unique_lock<std::mutex> lock(mutex);
    all_done.wait(lock, [this] { return done.load() == size(); });
  }
};

// Writes NUM_SUMS doubles. `adam` is null where no diagonal is asked for. Returns 0, or 1 when memory ran out.
AMFT_EXPORT int amft_multi_tensor_dot_cpu(const Row *rows, int64_t num_rows, int num_u, const Adam *adam,
                                          int num_threads, double *out) try {
  auto work = std::make_shared<Work>();
  for (const Row *row = rows; row < rows + num_rows; row++)
    for (int64_t begin = 0; begin < row->numel; begin += CHUNK)
      work->chunks.push_back({row, begin, begin + CHUNK < row->numel ? begin + CHUNK : row->numel});
  work->sums.resize(work->size() * NUM_SUMS);
  work->num_u = num_u;
  work->adam = adam;
  work->chunk_sums = pick_isa().sums;
  try {
    for (int i = 1; i < num_threads; i++) std::thread([work] { work->take_chunks(); }).detach();
  } catch (const std::system_error &) {
    // The process may start no more threads: those that there are do the work.
  }
  work->take_chunks();
  work->wait();

  for (int j = 0; j < NUM_SUMS; j++) out[j] = 0;
  for (int64_t i = 0; i < work->size(); i++)
    for (int j = 0; j < NUM_SUMS; j++) out[j] += work->sums[i * NUM_SUMS + j];
  return 0;
} catch (const std::bad_alloc &) {
  return 1;
}
