/* A CUDA driver of two devices that computes nothing: memory is the host's, kernels are not run.

   It writes a line about every call that matters into the file FAKE_CUDA_LOG. FAKE_CUDA_CAPABILITY
   is the compute capability of both devices, 90 for 9.0. What it has no function for is absent. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef void *handle;
enum { DEVICES = 2, SUCCESS = 0, INVALID_IMAGE = 200, INVALID_CONTEXT = 201, INVALID_DEVICE = 101 };

static __thread handle contexts[64];
static __thread int depth;

static void note(const char *format, ...) {
  FILE *file = getenv("FAKE_CUDA_LOG") ? fopen(getenv("FAKE_CUDA_LOG"), "a") : NULL;
  if (!file) return;
  va_list arguments;
  va_start(arguments, format);
  vfprintf(file, format, arguments);
  va_end(arguments);
  fclose(file);
}

static handle context_of(int device) { return (handle)(uintptr_t)(4096 * (device + 1)); }
static int current(void) {
  return depth ? (int)((uintptr_t)contexts[depth - 1] / 4096) - 1 : -1;
}

int cuInit(unsigned flags) { return SUCCESS; }
int cuDriverGetVersion(int *version) { return *version = 13000, SUCCESS; }
int cuGetErrorName(int error, const char **text) { return *text = "CUDA_ERROR_FAKE", SUCCESS; }
int cuGetErrorString(int error, const char **text) { return *text = "fake", SUCCESS; }

int cuDeviceGetCount(int *count) { return *count = DEVICES, SUCCESS; }
int cuDeviceGet(int *device, int i) { return *device = i, i < DEVICES ? SUCCESS : INVALID_DEVICE; }
int cuDeviceGetName(char *name, int n, int device) {
  return snprintf(name, n, "fake GPU"), SUCCESS;
}
int cuDeviceGetUuid(char *uuid, int device) { return memset(uuid, device, 16), SUCCESS; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  const char *given = getenv("FAKE_CUDA_CAPABILITY");
  int capability = given ? atoi(given) : 90;
  switch (attribute) {
    case 8: return *value = 48 << 10, SUCCESS;   /* shared memory of a block */
    case 16: return *value = 132, SUCCESS;       /* multiprocessors */
    case 75: return *value = capability / 10, SUCCESS;
    case 76: return *value = capability % 10, SUCCESS;
    case 97: return *value = 227 << 10, SUCCESS; /* shared memory of a block that asks for it */
    default: return *value = 0, SUCCESS;
  }
}

int cuDevicePrimaryCtxRetain(handle *context, int device) {
  return *context = context_of(device), SUCCESS;
}
int cuDevicePrimaryCtxRelease(int device) { return SUCCESS; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
  return *flags = 0, *active = 1, SUCCESS;
}
int cuCtxGetCurrent(handle *context) {
  return *context = depth ? contexts[depth - 1] : NULL, SUCCESS;
}
int cuCtxSetCurrent(handle context) {
  if (depth) depth--;
  if (context) contexts[depth++] = context;
  return SUCCESS;
}
int cuCtxPushCurrent(handle context) { return contexts[depth++] = context, SUCCESS; }
int cuCtxPopCurrent(handle *context) {
  if (!depth) return INVALID_CONTEXT;
  *context = contexts[--depth];
  return SUCCESS;
}
int cuCtxGetDevice(int *device) {
  return *device = current(), depth ? SUCCESS : INVALID_CONTEXT;
}
int cuCtxSynchronize(void) { return note("synchronize\n"), SUCCESS; }

int cuMemGetInfo(size_t *free, size_t *total) { return *free = *total = 1ull << 36, SUCCESS; }
int cuMemAlloc(uint64_t *address, size_t n) {
  *address = (uintptr_t)aligned_alloc(512, (n + 511) / 512 * 512);
  return note("allocate %zu %d\n", n, current()), SUCCESS;
}
int cuMemFree(uint64_t address) { return free((handle)(uintptr_t)address), SUCCESS; }
int cuMemcpyHtoD(uint64_t to, const void *from, size_t n) {
  memcpy((handle)(uintptr_t)to, from, n);
  return note("to_device %zu %d\n", n, current()), SUCCESS;
}
int cuMemcpyDtoH(void *to, uint64_t from, size_t n) {
  memcpy(to, (handle)(uintptr_t)from, n);
  return note("to_host %zu %d\n", n, current()), SUCCESS;
}
int cuPointerGetAttribute(int *value, int attribute, uint64_t address) {
  return *value = 1, SUCCESS;
}

int cuStreamCreate(handle *stream, unsigned flags) { return *stream = (handle)0x5ea, SUCCESS; }
int cuStreamDestroy(handle stream) { return SUCCESS; }
int cuEventCreate(handle *event, unsigned flags) {
  return note("event %u\n", flags), *event = (handle)0xe7, SUCCESS;
}
int cuEventRecord(handle event, handle stream) {
  return note("record %zu %d\n", (size_t)stream, current()), SUCCESS;
}
int cuStreamWaitEvent(handle stream, handle event, unsigned flags) {
  return note("wait %zu %d\n", (size_t)stream, current()), SUCCESS;
}
int cuEventDestroy(handle event) { return note("destroy\n"), SUCCESS; }

static handle named(const char *name) {
  return strdup(name); /* as long as the process */
}
static int is_code(const void *code) { return !memcmp(code, "\177ELF", 4); }
int cuLibraryLoadData(handle *library, const void *code, handle a, handle b, unsigned c, handle d,
                      handle e, unsigned f) {
  *library = named("library");
  return note("compiled\n"), is_code(code) ? SUCCESS : INVALID_IMAGE;
}
int cuLibraryUnload(handle library) { return SUCCESS; }
int cuLibraryGetKernel(handle *kernel, handle library, const char *name) {
  return *kernel = named(name), SUCCESS;
}
int cuKernelGetFunction(handle *function, handle kernel) {
  return *function = kernel, depth ? SUCCESS : INVALID_CONTEXT;
}
int cuKernelGetAttribute(int *value, int attribute, handle kernel, int device) {
  return *value = 32, SUCCESS;
}
int cuModuleLoadData(handle *module, const void *code) {
  *module = named("module");
  return note("loaded %d\n", current()), is_code(code) ? SUCCESS : INVALID_IMAGE;
}
int cuModuleGetFunction(handle *function, handle module, const char *name) {
  return *function = named(name), SUCCESS;
}
int cuFuncSetAttribute(handle function, int attribute, int value) {
  return note("allow %s %d %d %d\n", (char *)function, attribute, value, current()), SUCCESS;
}
int cuLaunchKernel(handle function, unsigned x, unsigned y, unsigned z, unsigned threads,
                   unsigned y_threads, unsigned z_threads, unsigned shared, handle stream,
                   handle *parameters, handle *extra) {
  note("launch %s %u %u %u %u %u %zu %zu %d\n", (char *)function, x, y, z, threads, shared,
       (size_t)stream, *(size_t *)extra[3], current());
  return depth && !parameters ? SUCCESS : INVALID_CONTEXT;
}

/* how the functions are found; those with a version in their name are the same here */
int cuGetProcAddress_v2(const char *name, handle *function, int version, uint64_t flags,
                        int *status) {
  Dl_info self, found;
  dladdr((handle)cuGetProcAddress_v2, &self);
  handle library = dlopen(self.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  *function = dlsym(library, name);
  if (*function && dladdr(*function, &found) && found.dli_fbase != self.dli_fbase) *function = NULL;
  if (status) *status = *function ? 0 : 1;
  return SUCCESS;
}
