/* A CUDA driver without a GPU, for compilers: it says which compute capability there is, and takes every module.
   The environment's COMPUTE_CAPABILITY is the capability without its point, such as 90, and SHARED_MEMORY what a
   block can have at most, in bytes. */

#include <stdlib.h>

static int capability(void) { return atoi(getenv("COMPUTE_CAPABILITY")); }
static int shared_memory(void) { return atoi(getenv("SHARED_MEMORY")); }

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int number) { *device = 0; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuModuleLoadData(void **module, const void *image) { *module = (void *)1; return 0; }
int cuModuleUnload(void *module) { return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = (void *)1; return 0; }
int cuGetErrorName(int error, const char **name) { *name = "error"; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "error"; return 0; }

int cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case 16: *value = 132; break;              /* multiprocessors */
    case 75: *value = capability() / 10; break; /* major */
    case 76: *value = capability() % 10; break; /* minor */
    case 97: *value = shared_memory(); break;
    default: *value = 1024;
  }
  return 0;
}

int cuFuncSetAttribute(void *function, int attribute, int value) {
  const int max_dynamic_shared_size = 8, invalid_value = 1;
  return attribute == max_dynamic_shared_size && value > shared_memory() ? invalid_value : 0;
}
