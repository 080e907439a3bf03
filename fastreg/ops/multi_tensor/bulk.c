/* The loops of bulk.py, which says what they are for. Compiled by Triton, which wants C. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

static int is_plain(PyObject *object, PyObject *types)
{
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(types); i++)
        if ((PyObject *)Py_TYPE(object) == PyTuple_GET_ITEM(types, i))
            return 1;
    return 0;
}

/* attributes(objects: list, name: str, descriptor, types: tuple) -> list

   descriptor: what ``types`` have by that name, a getter in C. It is called without being looked up; a third less. */
static PyObject *attributes(PyObject *self, PyObject *arguments)
{
    PyObject *objects, *name, *descriptor, *types;
    if (!PyArg_ParseTuple(arguments, "O!UO!O!", &PyList_Type, &objects, &name, &PyGetSetDescr_Type, &descriptor,
                          &PyTuple_Type, &types))
        return NULL;
    PyGetSetDef *getter = ((PyGetSetDescrObject *)descriptor)->d_getset;
    Py_ssize_t count = PyList_GET_SIZE(objects);
    PyObject *found = PyList_New(count);
    for (Py_ssize_t i = 0; found != NULL && i < count; i++) {
        PyObject *object = PyList_GET_ITEM(objects, i);
        PyObject *value =
            is_plain(object, types) ? getter->get(object, getter->closure) : PyObject_GetAttr(object, name);
        if (value == NULL)
            Py_CLEAR(found);
        else
            PyList_SET_ITEM(found, i, value);
    }
    return found;
}

typedef struct {
    PyObject *bytes;
    Py_ssize_t used;
} Pointers;

static int push(Pointers *found, const void *pointer)
{
    Py_ssize_t size = PyBytes_GET_SIZE(found->bytes);
    if (found->used == size && _PyBytes_Resize(&found->bytes, 2 * size) < 0)
        return -1;
    memcpy(PyBytes_AS_STRING(found->bytes) + found->used, &pointer, sizeof pointer);
    found->used += sizeof pointer;
    return 0;
}

/* identities(objects: list, dicts: list) -> bytes */
static PyObject *identities(PyObject *self, PyObject *arguments)
{
    PyObject *objects, *dicts;
    if (!PyArg_ParseTuple(arguments, "O!O!", &PyList_Type, &objects, &PyList_Type, &dicts))
        return NULL;
    Py_ssize_t guess = PyList_GET_SIZE(objects) + 4 * PyList_GET_SIZE(dicts) + 1;
    Pointers found = {PyBytes_FromStringAndSize(NULL, guess * sizeof(void *)), 0};
    if (found.bytes == NULL)
        return NULL;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(objects); i++)
        if (push(&found, PyList_GET_ITEM(objects, i)) < 0)
            return NULL;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(dicts); i++) {
        PyObject *key, *value;
        Py_ssize_t place = 0;
        while (PyDict_Next(PyList_GET_ITEM(dicts, i), &place, &key, &value)) /* 0 for what is no dict */
            if (push(&found, value) < 0)
                return NULL;
    }
    _PyBytes_Resize(&found.bytes, found.used);
    return found.bytes;
}

/* addresses(tensors: list, dicts: list, data_ptr: int, types: tuple) -> bytes

   data_ptr: the address of a C function from a tensor to the address of its elements. Nothing here can catch what it
   throws, so tensors are of these types, and the caller knows that they lie somewhere. None has -1, and so has a dict
   without such tensors; of others the last one counts. */
static PyObject *addresses(PyObject *self, PyObject *arguments)
{
    PyObject *tensors, *dicts, *types;
    Py_ssize_t function;
    if (!PyArg_ParseTuple(arguments, "O!O!nO!", &PyList_Type, &tensors, &PyList_Type, &dicts, &function,
                          &PyTuple_Type, &types))
        return NULL;
    void *(*data_ptr)(PyObject *) = (void *(*)(PyObject *))function;
    Py_ssize_t count = PyList_GET_SIZE(tensors);
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, (count + PyList_GET_SIZE(dicts)) * sizeof(void *));
    if (bytes == NULL)
        return NULL;
    void **found = (void **)PyBytes_AS_STRING(bytes);
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *tensor = PyList_GET_ITEM(tensors, i);
        if (tensor == Py_None) {
            found[i] = (void *)-1;
        } else if (is_plain(tensor, types)) {
            found[i] = data_ptr(tensor);
        } else {
            Py_DECREF(bytes);
            return PyErr_Format(PyExc_TypeError, "not a plain tensor: %.200s", Py_TYPE(tensor)->tp_name);
        }
    }
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(dicts); i++) {
        PyObject *key, *value, *last = NULL;
        Py_ssize_t place = 0;
        while (PyDict_Next(PyList_GET_ITEM(dicts, i), &place, &key, &value)) /* 0 for what is no dict */
            if (is_plain(value, types))
                last = value;
        found[count + i] = last == NULL ? (void *)-1 : data_ptr(last);
    }
    return bytes;
}

static PyMethodDef methods[] = {
    {"attributes", attributes, METH_VARARGS, NULL},
    {"identities", identities, METH_VARARGS, NULL},
    {"addresses", addresses, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "fastreg_bulk", NULL, -1, methods};

PyMODINIT_FUNC PyInit_fastreg_bulk(void)
{
    return PyModule_Create(&module);
}
