// Counts what asks the C library for memory, in all threads of the process: linked to a program, or preloaded. glibc
// alone lets malloc() be replaced and called under another name.
#include <dlfcn.h>
#include <errno.h>  // NOLINT(modernize-deprecated-headers): errno, of C
#include <execinfo.h>
#include <sys/mman.h>

#include <atomic>
#include <cstddef>
#include <cstdio>
#include <cstdlib>

namespace {

std::atomic<unsigned long> allocations{0};
std::atomic<long> to_show{0};  // allocations whose callers are printed
thread_local bool showing __attribute__((tls_model("initial-exec"))) = false;

void count(std::size_t bytes) {
  allocations.fetch_add(1, std::memory_order_relaxed);
  if (to_show.load(std::memory_order_relaxed) <= 0 || showing) return;
  showing = true;  // what follows allocates itself
  if (to_show.fetch_sub(1) > 0) {
    void* frames[24];
    const int depth = backtrace(frames, 24);
    std::fprintf(stderr, "%zu bytes, from\n", bytes);
    backtrace_symbols_fd(frames, depth, 2);
  }
  showing = false;
}

}  // namespace

extern "C" {

void* __libc_malloc(std::size_t bytes);
void* __libc_calloc(std::size_t items, std::size_t bytes);
void* __libc_realloc(void* old, std::size_t bytes);
void* __libc_memalign(std::size_t alignment, std::size_t bytes);

unsigned long onepass_allocations() { return allocations.load(std::memory_order_relaxed); }
void onepass_show_allocations(long next) { to_show.store(next, std::memory_order_relaxed); }

void* malloc(std::size_t bytes) {
  count(bytes);
  return __libc_malloc(bytes);
}
void* calloc(std::size_t items, std::size_t bytes) {
  count(items * bytes);
  return __libc_calloc(items, bytes);
}
void* realloc(void* old, std::size_t bytes) {
  count(bytes);
  return __libc_realloc(old, bytes);
}
void* memalign(std::size_t alignment, std::size_t bytes) {
  count(bytes);
  return __libc_memalign(alignment, bytes);
}
void* aligned_alloc(std::size_t alignment, std::size_t bytes) {
  count(bytes);
  return __libc_memalign(alignment, bytes);
}
int posix_memalign(void** to, std::size_t alignment, std::size_t bytes) {
  count(bytes);
  void* const made = __libc_memalign(alignment, bytes);
  if (made == nullptr) return ENOMEM;
  *to = made;
  return 0;
}
// The C library's own calls do not come here: what malloc() maps is counted once.
void* mmap(void* address, std::size_t bytes, int protection, int flags, int file, off_t offset) {
  using Mmap = void* (*)(void*, std::size_t, int, int, int, off_t);
  static const auto next = reinterpret_cast<Mmap>(dlsym(RTLD_NEXT, "mmap"));
  count(bytes);
  return next(address, bytes, protection, flags, file, offset);
}

}  // extern "C"
