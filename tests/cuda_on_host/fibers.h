// Stacks that a thread of the host switches between: what lets the threads of a block wait for each other.
//
// A switch costs a few nanoseconds on x86-64. A stack that has been left for good is used again, so that the threads of
// a kernel without barriers all run on one stack.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if !defined(__x86_64__) || defined(ONEPASS_HOST_UCONTEXT)
#define ONEPASS_HOST_USES_UCONTEXT 1
#include <ucontext.h>
#else
#define ONEPASS_HOST_USES_UCONTEXT 0
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

namespace onepass_host {

#if !ONEPASS_HOST_USES_UCONTEXT
// Saves what a function keeps for its caller on the stack in use, and goes on with another.
extern "C" __attribute__((visibility("hidden"))) void onepass_host_switch(void** from, void* to);
asm(R"(
.pushsection .text
.globl onepass_host_switch
.hidden onepass_host_switch
.type onepass_host_switch, @function
.p2align 4
onepass_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size onepass_host_switch, .-onepass_host_switch
.popsection
)");
#endif

// One place of execution. The first one of a host's thread is the stack that the thread came with.
class Fiber {
 public:
  // Parameters of 32 KiB and the frames of an unoptimized build have room; pages are taken as they are touched.
  static constexpr std::size_t bytes = std::size_t{512} << 10;

  Fiber() = default;
  explicit Fiber(void (*entry)()) : entry_(entry), page_(static_cast<std::size_t>(sysconf(_SC_PAGESIZE))) {
    void* const memory =
        mmap(nullptr, page_ + bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, page_, PROT_NONE) != 0) {
      std::fputs("cuda_on_host: no memory for the stack of a thread\n", stderr);
      std::abort();
    }
    stack_ = static_cast<std::byte*>(memory) + page_;
#if defined(__SANITIZE_THREAD__)
    tsan_ = __tsan_create_fiber(0);
#endif
  }
  ~Fiber() {
    if (stack_ == nullptr) return;
#if defined(__SANITIZE_THREAD__)
    __tsan_destroy_fiber(tsan_);
#endif
    munmap(stack_ - page_, page_ + bytes);
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next switch to this fiber calls its entry, which never returns.
  void restart() {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack_, bytes);
    fake_ = nullptr;
#endif
#if ONEPASS_HOST_USES_UCONTEXT
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_;
    context_.uc_stack.ss_size = bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry_, 0);
#else
    // Six registers, the entry, and an address to return to that ends every walk over the stack. The entry starts with
    // the alignment of a function that has been called: 8 bytes past a multiple of 16.
    auto* const top = reinterpret_cast<std::uint64_t*>(stack_ + bytes);
    for (int i = 1; i <= 8; ++i) top[-i] = 0;
    top[-2] = reinterpret_cast<std::uint64_t>(entry_);
    pointer_ = top - 8;
#endif
  }

  // Leaves `from` (for good: its stack is not needed again) and goes on with this one.
  __attribute__((no_sanitize("thread"))) void enter(Fiber& from, [[maybe_unused]] bool for_good) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_, bottom(), size());
    arriving_from = &from;
#endif
#if defined(__SANITIZE_THREAD__)
    if (from.stack_ == nullptr) from.tsan_ = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(tsan_, 0);
#endif
#if ONEPASS_HOST_USES_UCONTEXT
    swapcontext(&from.context_, &context_);
#else
    onepass_host_switch(&from.pointer_, pointer_);
#endif
    from.arrived();
  }

  // Called first by an entry: enter() does so for all that come back.
  __attribute__((no_sanitize("thread"))) void arrived() {
#if defined(__SANITIZE_ADDRESS__)
    const void* old = nullptr;
    std::size_t old_size = 0;
    __sanitizer_finish_switch_fiber(fake_, &old, &old_size);
    if (arriving_from->stack_ == nullptr) {
      arriving_from->asan_bottom_ = old;
      arriving_from->asan_size_ = old_size;
    }
#endif
  }

 private:
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom() const { return stack_ == nullptr ? asan_bottom_ : stack_; }
  std::size_t size() const { return stack_ == nullptr ? asan_size_ : bytes; }
  static inline thread_local Fiber* arriving_from = nullptr;
  void* fake_ = nullptr;
  const void* asan_bottom_ = nullptr;
  std::size_t asan_size_ = 0;
#endif
#if defined(__SANITIZE_THREAD__)
  void* tsan_ = nullptr;
#endif
#if ONEPASS_HOST_USES_UCONTEXT
  ucontext_t context_ = {};
#else
  void* pointer_ = nullptr;
#endif
  void (*entry_)() = nullptr;
  std::size_t page_ = 0;
  std::byte* stack_ = nullptr;
};

}  // namespace onepass_host
