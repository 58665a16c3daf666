/* A stand-in for libcuda.so.1: one imaginary H100 that loads every kernel, checks every launch and runs none.

   What a real driver refuses is refused with the same error code, and cuGetErrorString says why. What a launch needs is read
   from the compiled kernel itself (the .nv.info sections of its ELF image), not from what the caller believes: the size of
   each parameter, the threads of a block, the registers of a thread. The launches that pass are kept for stub_launch(). */

#include <elf.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda.h"

enum { SHARED = 48 * 1024, SHARED_OPTIN = 227 * 1024, SHARED_OF_MULTIPROCESSOR = 228 * 1024, REGISTERS = 65536 };
enum { RESERVED = 1024 }; /* bytes of shared memory that a block has for the system, in its image but in no limit */
enum { PARAMETERS = 128, PARAMETER_BYTES = 16 };
/* Addresses of the device: no pointer to host memory is as large. */
static const uint64_t MEMORY_BEGIN = 1ull << 52, MEMORY_END = 1ull << 53;

typedef struct {
  char name[256];
  uint32_t parameters, sizes[PARAMETERS], threads, registers, shared_static, shared_dynamic_limit;
} Function;

typedef struct {
  char name[256];
  uint32_t grid[3], block[3], shared, parameters, sizes[PARAMETERS];
  uint8_t values[PARAMETERS][PARAMETER_BYTES];
} Launch;

static Launch *launches;
static uint64_t num_launches;
static char reason[512] = "no error";

uint64_t stub_launches(void) { return num_launches; }
const Launch *stub_launch(uint64_t i) { return i < num_launches ? &launches[i] : NULL; }
void stub_forget_launches(void) { num_launches = 0; }

static CUresult refuse(CUresult code, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(reason, sizeof reason, format, arguments);
  va_end(arguments);
  return code;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = error == CUDA_SUCCESS ? "no error" : reason;
  return CUDA_SUCCESS;
}

/* The attributes of an .nv.info section: a format byte, an attribute byte, and two bytes that are the value or, where the
   format is 4, the number of bytes that follow. */
static void read_attributes(Function *f, const uint8_t *at, const uint8_t *end) {
  while (at + 4 <= end) {
    uint8_t format = at[0], attribute = at[1];
    uint16_t size = (uint16_t)(at[2] | at[3] << 8);
    const uint8_t *value = at + 4;
    uint32_t words[3] = {0};
    if (format == 4) memcpy(words, value, size < sizeof words ? size : sizeof words);
    if (format == 4 && attribute == 0x17) { /* KPARAM_INFO: index; ordinal and offset; size in the highest 14 bits */
      uint32_t ordinal = words[1] & 0xffff;
      if (ordinal < PARAMETERS) {
        f->sizes[ordinal] = words[2] >> 18;
        if (ordinal >= f->parameters) f->parameters = ordinal + 1;
      }
    }
    if (format == 4 && attribute == 0x10) f->threads = words[0] * words[1] * words[2]; /* REQNTID */
    if (format == 4 && attribute == 0x2f) f->registers = words[1];                     /* REGCOUNT: function; registers */
    at = value + (format == 4 ? size : 0);
  }
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  const Elf64_Ehdr *header = image;
  if (memcmp(header->e_ident, ELFMAG, SELFMAG) != 0) return refuse(CUDA_ERROR_INVALID_IMAGE, "the module is not an ELF image");
  *module = (CUmodule)image; /* Triton keeps the image */
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  const uint8_t *image = (const uint8_t *)module;
  const Elf64_Ehdr *header = (const Elf64_Ehdr *)image;
  const Elf64_Shdr *sections = (const Elf64_Shdr *)(image + header->e_shoff);
  const char *names = (const char *)(image + sections[header->e_shstrndx].sh_offset);
  char info[300], text[300], shared[300];
  snprintf(info, sizeof info, ".nv.info.%s", name);
  snprintf(text, sizeof text, ".text.%s", name);
  snprintf(shared, sizeof shared, ".nv.shared.%s", name);
  Function *f = calloc(1, sizeof *f);
  int found = 0;
  for (int i = 0; i < header->e_shnum; i++) {
    const char *section = names + sections[i].sh_name;
    const uint8_t *begin = image + sections[i].sh_offset;
    if (!strcmp(section, ".nv.info") || !strcmp(section, info)) read_attributes(f, begin, begin + sections[i].sh_size);
    if (!strcmp(section, text)) found = 1;
    if (!strcmp(section, shared) && sections[i].sh_size > RESERVED) f->shared_static = (uint32_t)sections[i].sh_size - RESERVED;
  }
  if (!found || !f->parameters || !f->registers) {
    free(f);
    return refuse(CUDA_ERROR_NOT_FOUND, "the module does not describe a kernel %s", name);
  }
  snprintf(f->name, sizeof f->name, "%s", name);
  f->shared_dynamic_limit = SHARED - f->shared_static;
  *function = (CUfunction)f;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  const Function *f = (const Function *)function;
  switch (attribute) {
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = f->threads ? (int)f->threads : 1024; break;
    case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = (int)f->registers; break;
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: *value = (int)f->shared_static; break;
    case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES: *value = 0; break;
    default: return refuse(CUDA_ERROR_INVALID_VALUE, "no attribute %d of a function", attribute);
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  Function *f = (Function *)function;
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)
    return refuse(CUDA_ERROR_INVALID_VALUE, "%s: no attribute %d to set", f->name, attribute);
  if (value < 0 || (uint32_t)value + f->shared_static > SHARED_OPTIN)
    return refuse(CUDA_ERROR_INVALID_VALUE, "%s: asks for %d bytes of shared memory, %d are there", f->name, value, SHARED_OPTIN);
  f->shared_dynamic_limit = (uint32_t)value;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **parameters, void **extra) {
  const Function *f = (const Function *)function;
  const uint32_t grid[3] = {c->gridDimX, c->gridDimY, c->gridDimZ}, most[3] = {0x7fffffff, 65535, 65535};
  for (int i = 0; i < 3; i++)
    if (grid[i] < 1 || grid[i] > most[i])
      return refuse(CUDA_ERROR_INVALID_VALUE, "%s: grid %u x %u x %u: %u along %c is beyond 1 to %u", f->name, grid[0],
                    grid[1], grid[2], grid[i], "xyz"[i], most[i]);
  uint64_t threads = (uint64_t)c->blockDimX * c->blockDimY * c->blockDimZ;
  if (threads < 1 || threads > 1024 || (f->threads && threads != f->threads))
    return refuse(CUDA_ERROR_INVALID_VALUE, "%s: a block of %llu threads, the kernel has %u", f->name,
                  (unsigned long long)threads, f->threads);
  if ((f->registers + 7) / 8 * 8 * threads > REGISTERS)
    return refuse(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "%s: %llu threads of %u registers, %d are there", f->name,
                  (unsigned long long)threads, f->registers, REGISTERS);
  if (c->sharedMemBytes > f->shared_dynamic_limit)
    return refuse(CUDA_ERROR_INVALID_VALUE, "%s: %u bytes of shared memory, %u were opted in to", f->name, c->sharedMemBytes,
                  f->shared_dynamic_limit);
  if (extra) return refuse(CUDA_ERROR_INVALID_VALUE, "%s: parameters in a buffer", f->name);

  launches = realloc(launches, (num_launches + 1) * sizeof *launches);
  Launch *launch = &launches[num_launches++];
  memset(launch, 0, sizeof *launch);
  memcpy(launch->name, f->name, sizeof launch->name);
  memcpy(launch->grid, grid, sizeof grid);
  launch->block[0] = c->blockDimX, launch->block[1] = c->blockDimY, launch->block[2] = c->blockDimZ;
  launch->shared = c->sharedMemBytes;
  launch->parameters = f->parameters;
  for (uint32_t i = 0; i < f->parameters; i++) {
    launch->sizes[i] = f->sizes[i];
    memcpy(launch->values[i], parameters[i], f->sizes[i] < PARAMETER_BYTES ? f->sizes[i] : PARAMETER_BYTES);
  }
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER || pointer < MEMORY_BEGIN || pointer >= MEMORY_END)
    return refuse(CUDA_ERROR_INVALID_VALUE, "%llx is no address of the device", (unsigned long long)pointer);
  *(CUdeviceptr *)data = pointer;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: *value = SHARED; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = SHARED_OPTIN; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = SHARED_OF_MULTIPROCESSOR; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = REGISTERS; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    default: *value = 0;
  }
  return CUDA_SUCCESS;
}

/* What Triton calls besides, with one device and one context. */
static CUcontext the_context = (CUcontext)1;
CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = CUDA_VERSION, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { return *count = 1, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int i) { return *device = i, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = the_context, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return *context = the_context, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
