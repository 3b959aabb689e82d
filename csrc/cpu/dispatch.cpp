#include "cpu/dispatch.h"

#include <atomic>
#include <stdexcept>

#if defined(ONEPASS_HAVE_AVX2) || defined(ONEPASS_HAVE_AVX512)
#include <cpuid.h>
#endif

namespace onepass {

extern const KernelTable kernels_scalar;
#if defined(ONEPASS_HAVE_AVX2)
extern const KernelTable kernels_avx2;
#endif
#if defined(ONEPASS_HAVE_AVX512)
extern const KernelTable kernels_avx512;
#endif

namespace {

#if defined(ONEPASS_HAVE_AVX2) || defined(ONEPASS_HAVE_AVX512)

struct Cpuid {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  explicit Cpuid(unsigned leaf) { __get_cpuid_count(leaf, 0, &eax, &ebx, &ecx, &edx); }
};

// The register state that the operating system saves and restores (XCR0); 0 where it does not say.
unsigned saved_state() {
  constexpr unsigned osxsave = 1U << 27;
  if ((Cpuid(1).ecx & osxsave) == 0) return 0;
  unsigned low = 0;   // NOLINT(misc-const-correctness): the instruction writes it
  unsigned high = 0;  // NOLINT(misc-const-correctness)
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

bool has(unsigned value, unsigned bits) { return (value & bits) == bits; }

bool runs_avx2() {
  constexpr unsigned avx = 1U << 28;
  constexpr unsigned f16c = 1U << 29;
  constexpr unsigned avx2 = 1U << 5;
  constexpr unsigned sse_and_ymm = 0x6;
  return has(Cpuid(1).ecx, avx | f16c) && has(Cpuid(7).ebx, avx2) && has(saved_state(), sse_and_ymm);
}

bool runs_avx512() {
  constexpr unsigned f_dq_bw_vl = (1U << 16) | (1U << 17) | (1U << 30) | (1U << 31);
  constexpr unsigned opmask_and_zmm = 0xE0;
  return runs_avx2() && has(Cpuid(7).ebx, f_dq_bw_vl) && has(saved_state(), opmask_and_zmm);
}

#endif

struct Row {
  Isa isa;
  const char* name;
  const KernelTable* table;  // null: not built in
  bool (*runs)();
};

constexpr Row kRows[] = {
    {Isa::scalar, "scalar", &kernels_scalar, [] { return true; }},
#if defined(ONEPASS_HAVE_AVX2)
    {Isa::avx2, "avx2", &kernels_avx2, runs_avx2},
#else
    {Isa::avx2, "avx2", nullptr, [] { return false; }},
#endif
#if defined(ONEPASS_HAVE_AVX512)
    {Isa::avx512, "avx512", &kernels_avx512, runs_avx512},
#else
    {Isa::avx512, "avx512", nullptr, [] { return false; }},
#endif
};

static_assert(kRows[0].isa == Isa::scalar && kRows[1].isa == Isa::avx2 && kRows[2].isa == Isa::avx512,
              "a row's position is its Isa");

const Row& row(Isa isa) { return kRows[static_cast<std::size_t>(isa)]; }

std::atomic<const KernelTable*>& active() {
  static std::atomic<const KernelTable*> table{row(available_isas().back()).table};
  return table;
}

}  // namespace

const char* isa_name(Isa isa) { return row(isa).name; }

const std::vector<Isa>& available_isas() {
  static const std::vector<Isa> isas = [] {
    std::vector<Isa> found;
    for (const Row& candidate : kRows) {
      if (candidate.runs()) found.push_back(candidate.isa);
    }
    return found;
  }();
  return isas;
}

std::optional<Isa> parse_isa(std::string_view name) {
  for (const Row& candidate : kRows) {
    if (name == candidate.name) return candidate.isa;
  }
  return std::nullopt;
}

const KernelTable& active_kernels() { return *active().load(std::memory_order_acquire); }

void set_isa(Isa isa) { set_isa(std::string_view(isa_name(isa))); }

void set_isa(std::string_view name) {
  std::string valid;
  for (const Isa isa : available_isas()) {
    if (name == isa_name(isa)) {
      active().store(row(isa).table, std::memory_order_release);
      return;
    }
    valid += (valid.empty() ? "'" : ", '") + std::string(isa_name(isa)) + "'";
  }
  throw std::invalid_argument("'" + std::string(name) + "' is " +
                              (parse_isa(name) ? "an instruction set that this machine or build does not have"
                                               : "not the name of an instruction set") +
                              "; available here: " + valid);
}

const Kernel* find_kernel(const KernelTable& table, std::string_view rule) {
  for (std::size_t k = 0; k < table.count; ++k) {
    if (rule == table.kernels[k].rule) return &table.kernels[k];
  }
  return nullptr;
}

}  // namespace onepass
