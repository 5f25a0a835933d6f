// Blocks gathered from pages and scattered into them: the bytes of each are one run, copied by several threads.

#include <cstdint>
#include <cstring>
#include <string>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace jmemserve {
namespace {

constexpr int64_t kPiece = 256 << 10;   // bytes that a thread copies in one go
constexpr int64_t kStreamed = 8 << 20;  // bytes of all blocks from which on they go around the caches
constexpr int64_t kHugePage = 2 << 20;

// Stores that go around the caches do not read first what they overwrite, a third of the traffic.
void copy_around_caches(char* to, const char* from, int64_t bytes) {
#if defined(__x86_64__)
  int64_t head = std::min<int64_t>(bytes, -reinterpret_cast<uintptr_t>(to) & 15);
  std::memcpy(to, from, head);
  to += head, from += head, bytes -= head;
  int64_t i = 0;
  for (; i + 64 <= bytes; i += 64) {
    _mm_prefetch(from + i + 512, _MM_HINT_NTA);
    __m128i a = _mm_loadu_si128((const __m128i*)(from + i)), b = _mm_loadu_si128((const __m128i*)(from + i + 16));
    __m128i c = _mm_loadu_si128((const __m128i*)(from + i + 32)), d = _mm_loadu_si128((const __m128i*)(from + i + 48));
    _mm_stream_si128((__m128i*)(to + i), a);
    _mm_stream_si128((__m128i*)(to + i + 16), b);
    _mm_stream_si128((__m128i*)(to + i + 32), c);
    _mm_stream_si128((__m128i*)(to + i + 48), d);
  }
  std::memcpy(to + i, from + i, bytes - i);
  _mm_sfence();  // before anybody is told that the bytes are there
#else
  std::memcpy(to, from, bytes);
#endif
}

// New memory of a large result comes in few huge pages instead of many small ones, each of which is a fault.
void expect_huge_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Where the runs are: run i of the pages is at `offset` + numbers[i] * `stride` bytes, run i of the blocks is at
// (i * places + place) * bytes.
struct Runs {
  const int32_t* numbers;
  int64_t count, bytes, stride, offset, place, places;
};

// ``part``: indices of the axes that follow the page's number, all before the bytes of a run.
ffi::Error runs_of(ffi::AnyBuffer pages, ffi::Buffer<ffi::S32> numbers, ffi::Buffer<ffi::S32> part, int64_t place,
                   int64_t places, int64_t blocks_bytes, Runs* runs) {
  auto dims = pages.dimensions();
  int64_t fixed = int64_t(part.element_count());
  if (fixed + 1 > int64_t(dims.size()) || dims[0] == 0) return ffi::Error::InvalidArgument("jmemserve: unknown shapes");
  int64_t stride = int64_t(pages.size_bytes()) / dims[0], bytes = stride, offset = 0;
  for (int64_t axis = 0; axis < fixed; axis++) {
    int32_t index = part.typed_data()[axis];
    if (index < 0 || index >= dims[axis + 1]) return ffi::Error::InvalidArgument("jmemserve: no such layer or half");
    bytes /= dims[axis + 1];
    offset += index * bytes;
  }
  int64_t count = int64_t(numbers.element_count());
  for (int64_t i = 0; i < count; i++)
    if (numbers.typed_data()[i] < 0 || numbers.typed_data()[i] >= dims[0])
      return ffi::Error::InvalidArgument("jmemserve: a block is outside of the pages");
  if (place < 0 || place >= places || count * places * bytes != blocks_bytes)
    return ffi::Error::InvalidArgument("jmemserve: sizes of pages and blocks that do not fit together");
  *runs = {numbers.typed_data(), count, bytes, stride, offset, place, places};
  return ffi::Error::Success();
}

// to_of(i), from_of(i): where run i goes to and comes from.
template <class To, class From>
void copy_runs(ffi::ThreadPool& pool, const Runs& runs, const To& to_of, const From& from_of) {
  int64_t pieces = (runs.bytes + kPiece - 1) / kPiece;  // of a run; of short runs several make one piece
  int64_t together = std::max<int64_t>(1, kPiece / std::max<int64_t>(runs.bytes, 1));
  bool streamed = runs.count * runs.places * runs.bytes >= kStreamed;
  auto copy = [&](char* to, const char* from, int64_t bytes) {
    if (streamed) copy_around_caches(to, from, bytes);
    else std::memcpy(to, from, bytes);
  };
  if (pieces > 1)
    return parallel(pool, runs.count * pieces, [&](int64_t work) {
      int64_t begin = work % pieces * kPiece;
      copy(to_of(work / pieces) + begin, from_of(work / pieces) + begin, std::min(kPiece, runs.bytes - begin));
    });
  parallel(pool, (runs.count + together - 1) / together, [&](int64_t work) {
    for (int64_t i = work * together; i < std::min(runs.count, (work + 1) * together); i++)
      copy(to_of(i), from_of(i), runs.bytes);
  });
}

ffi::Error gather(ffi::ThreadPool pool, ffi::AnyBuffer pages, ffi::Buffer<ffi::S32> numbers,
                  ffi::Buffer<ffi::S32> part, ffi::AnyBuffer before, ffi::Result<ffi::AnyBuffer> blocks, int64_t place,
                  int64_t places) {
  Runs runs;
  ffi::Error error = runs_of(pages, numbers, part, place, places, int64_t(blocks->size_bytes()), &runs);
  if (error.failure()) return error;
  if (place > 0 && before.untyped_data() != blocks->untyped_data())
    return ffi::Error::InvalidArgument("jmemserve: what was gathered before must be in the same memory");
  if (place == 0) expect_huge_pages(blocks->untyped_data(), int64_t(blocks->size_bytes()));
  auto* to = (char*)blocks->untyped_data();
  auto* from = (const char*)pages.untyped_data() + runs.offset;
  copy_runs(
      pool, runs, [&](int64_t i) { return to + (i * places + place) * runs.bytes; },
      [&](int64_t i) { return from + runs.numbers[i] * runs.stride; });
  return ffi::Error::Success();
}

ffi::Error scatter(ffi::ThreadPool pool, ffi::AnyBuffer given, ffi::Buffer<ffi::S32> numbers,
                   ffi::Buffer<ffi::S32> part, ffi::AnyBuffer blocks, ffi::Result<ffi::AnyBuffer> pages, int64_t place,
                   int64_t places) {
  Runs runs;
  ffi::Error error = runs_of(given, numbers, part, place, places, int64_t(blocks.size_bytes()), &runs);
  if (error.failure()) return error;
  if (given.untyped_data() != pages->untyped_data())
    return ffi::Error::InvalidArgument("jmemserve: the pages must be written in place");
  auto* to = (char*)pages->untyped_data() + runs.offset;
  auto* from = (const char*)blocks.untyped_data();
  copy_runs(
      pool, runs, [&](int64_t i) { return to + runs.numbers[i] * runs.stride; },
      [&](int64_t i) { return from + (i * places + place) * runs.bytes; });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jmemserve

XLA_FFI_DEFINE_HANDLER_SYMBOL(jmemserve_gather, jmemserve::gather,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()         // pages
                                  .Arg<ffi::Buffer<ffi::S32>>()  // numbers
                                  .Arg<ffi::Buffer<ffi::S32>>()  // part
                                  .Arg<ffi::AnyBuffer>()         // blocks with what is at earlier places, or none
                                  .Ret<ffi::AnyBuffer>()         // blocks
                                  .Attr<int64_t>("place")
                                  .Attr<int64_t>("places"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jmemserve_scatter, jmemserve::scatter,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()         // pages
                                  .Arg<ffi::Buffer<ffi::S32>>()  // numbers
                                  .Arg<ffi::Buffer<ffi::S32>>()  // part
                                  .Arg<ffi::AnyBuffer>()         // blocks
                                  .Ret<ffi::AnyBuffer>()         // pages, the same memory
                                  .Attr<int64_t>("place")
                                  .Attr<int64_t>("places"));
