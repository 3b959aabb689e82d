// The Python module onepass._cuda. It holds the kernels for CUDA devices and offers them to onepass._cpu, whose
// bindings know both; there is nothing else in it.
#include <pybind11/pybind11.h>

#include "cuda/backend.h"
#include "cuda/driver.h"

namespace py = pybind11;

PYBIND11_MODULE(_cuda, m, py::mod_gil_not_used()) {
  namespace cuda = onepass::cuda;
  m.doc() = "The CUDA kernels of onepass. Use the classes and functions of the package instead.";
  m.attr("__version__") = ONEPASS_VERSION;
  m.attr("backend") = py::capsule(&cuda::the_driver(), cuda::kBackendCapsule);
}
