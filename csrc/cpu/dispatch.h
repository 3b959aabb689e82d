// Which instruction set runs. Compiled for the baseline; nothing here executes an instruction beyond it.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/kernel.h"

namespace onepass {

const char* isa_name(Isa isa);

// The instruction sets that were built in and that this CPU and operating system can run, slowest first.
const std::vector<Isa>& available_isas();

// Every name that this build knows, available here or not.
std::optional<Isa> parse_isa(std::string_view name);

// The table in use: the last of available_isas() unless set_isa() chose another. Throws std::invalid_argument, with the
// valid names, when the instruction set was not built in or cannot run here.
const KernelTable& active_kernels();
void set_isa(Isa isa);
void set_isa(std::string_view name);

// Null if there is no such rule.
const Kernel* find_kernel(const KernelTable& table, std::string_view rule);

}  // namespace onepass
