// Short calls of recurrent layers from Python, past the dispatcher: class ShortCall of rnnkern._C.
#pragma once

#include <Python.h>

namespace rnnkern {

// Adds ShortCall and connect_torch to the module; false with an exception set.
bool add_short_call(PyObject* module);

}  // namespace rnnkern
