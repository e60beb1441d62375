/* What cuGetProcAddress finds, by name and by the version that is asked for; and errors' names. */

#include "driver.h"

#include <string.h>

typedef struct {
    const char *name; /* without the suffix of its version */
    int since;        /* the CUDA version that brought it */
    void *address;
} entry_point;

CUresult cuMemcpyBatchAsync_v2(CUdeviceptr *, CUdeviceptr *, size_t *, size_t, CUmemcpyAttributes *,
                               size_t *, size_t, CUstream);
CUresult cuEventElapsedTime_v2(float *, CUevent, CUevent);

#define FIRST(name, since) {#name, since, (void *)name}
#define LATER(name, since, symbol) {#name, since, (void *)symbol}

/* Versions of one name: the oldest first. */
static const entry_point entry_points[] = {
    FIRST(cuInit, 2000),
    FIRST(cuDriverGetVersion, 2020),
    FIRST(cuDeviceGet, 2000),
    FIRST(cuDeviceGetCount, 2000),
    FIRST(cuDeviceGetName, 2000),
    FIRST(cuDeviceGetAttribute, 2000),
    FIRST(cuDeviceGetPCIBusId, 4010),
    FIRST(cuDeviceCanAccessPeer, 4000),
    LATER(cuDeviceTotalMem, 3020, cuDeviceTotalMem_v2),
    LATER(cuDeviceGetUuid, 11040, cuDeviceGetUuid_v2),
    FIRST(cuDevicePrimaryCtxRetain, 7000),
    LATER(cuDevicePrimaryCtxRelease, 11000, cuDevicePrimaryCtxRelease_v2),
    FIRST(cuDevicePrimaryCtxGetState, 7000),
    FIRST(cuCtxGetCurrent, 4000),
    FIRST(cuCtxSetCurrent, 4000),
    LATER(cuCtxPushCurrent, 4000, cuCtxPushCurrent_v2),
    LATER(cuCtxPopCurrent, 4000, cuCtxPopCurrent_v2),
    FIRST(cuCtxGetDevice, 2000),
    FIRST(cuCtxSynchronize, 2000),
    FIRST(cuCtxGetStreamPriorityRange, 5050),
    FIRST(cuCtxGetLimit, 3010),
    FIRST(cuCtxSetLimit, 3010),
    FIRST(cuModuleLoadData, 2000),
    FIRST(cuModuleLoadDataEx, 2010),
    FIRST(cuModuleUnload, 2000),
    FIRST(cuModuleGetFunction, 2000),
    FIRST(cuFuncGetAttribute, 2020),
    FIRST(cuFuncSetAttribute, 9000),
    FIRST(cuFuncSetCacheConfig, 3000),
    FIRST(cuLaunchKernel, 4000),
    FIRST(cuLaunchKernelEx, 11060),
    FIRST(cuStreamCreate, 2000),
    FIRST(cuStreamCreateWithPriority, 5050),
    FIRST(cuStreamGetPriority, 5050),
    FIRST(cuStreamGetFlags, 5050),
    FIRST(cuStreamGetCtx, 9020),
    LATER(cuStreamDestroy, 4000, cuStreamDestroy_v2),
    FIRST(cuStreamQuery, 2000),
    FIRST(cuStreamSynchronize, 2000),
    FIRST(cuStreamWaitEvent, 3020),
    LATER(cuStreamBeginCapture, 10010, cuStreamBeginCapture_v2),
    FIRST(cuStreamEndCapture, 10000),
    FIRST(cuStreamIsCapturing, 10000),
    LATER(cuStreamGetCaptureInfo, 11030, cuStreamGetCaptureInfo_v2),
    LATER(cuStreamGetCaptureInfo, 12030, cuStreamGetCaptureInfo_v3),
    FIRST(cuThreadExchangeStreamCaptureMode, 10010),
    FIRST(cuGraphDestroy, 10000),
    FIRST(cuEventCreate, 2000),
    FIRST(cuEventRecord, 2000),
    FIRST(cuEventRecordWithFlags, 11010),
    FIRST(cuEventQuery, 2000),
    FIRST(cuEventSynchronize, 2000),
    FIRST(cuEventElapsedTime, 2000),
    LATER(cuEventElapsedTime, 12080, cuEventElapsedTime_v2),
    LATER(cuEventDestroy, 4000, cuEventDestroy_v2),
    LATER(cuMemAlloc, 3020, cuMemAlloc_v2),
    LATER(cuMemFree, 3020, cuMemFree_v2),
    LATER(cuMemGetInfo, 3020, cuMemGetInfo_v2),
    FIRST(cuMemAllocAsync, 11020),
    FIRST(cuMemFreeAsync, 11020),
    FIRST(cuMemHostAlloc, 2020),
    LATER(cuMemAllocHost, 3020, cuMemAllocHost_v2),
    FIRST(cuMemFreeHost, 2000),
    LATER(cuMemHostRegister, 6050, cuMemHostRegister_v2),
    FIRST(cuMemHostUnregister, 4000),
    LATER(cuMemHostGetDevicePointer, 3020, cuMemHostGetDevicePointer_v2),
    FIRST(cuMemHostGetFlags, 2030),
    LATER(cuMemGetAddressRange, 3020, cuMemGetAddressRange_v2),
    FIRST(cuPointerGetAttribute, 4000),
    FIRST(cuMemcpy, 4000),
    FIRST(cuMemcpyAsync, 4000),
    LATER(cuMemcpyHtoD, 3020, cuMemcpyHtoD_v2),
    LATER(cuMemcpyDtoH, 3020, cuMemcpyDtoH_v2),
    LATER(cuMemcpyHtoDAsync, 3020, cuMemcpyHtoDAsync_v2),
    LATER(cuMemcpyDtoHAsync, 3020, cuMemcpyDtoHAsync_v2),
    LATER(cuMemcpyDtoDAsync, 3020, cuMemcpyDtoDAsync_v2),
    LATER(cuMemcpy2DAsync, 3020, cuMemcpy2DAsync_v2),
    FIRST(cuMemcpyBatchAsync, 12080),
    LATER(cuMemcpyBatchAsync, 13000, cuMemcpyBatchAsync_v2),
    FIRST(cuMemsetD8Async, 3020),
    FIRST(cuGetErrorName, 6000),
    FIRST(cuGetErrorString, 6000),
    LATER(cuGetProcAddress, 12000, cuGetProcAddress_v2),
};

#define NUM_ENTRY_POINTS (sizeof entry_points / sizeof *entry_points)

/* The newest version that both the caller and this driver know. What is not imitated is not
   found, as if the driver were too old for it. */
static CUresult find_entry_point(const char *name, void **found, int version,
                                 CUdriverProcAddressQueryResult *status) {
    CUdriverProcAddressQueryResult ignored;
    if (!status)
        status = &ignored;
    *found = NULL;
    *status = CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    if (version > configuration.driver_version)
        return complain(CUDA_ERROR_INVALID_VALUE, "%s of CUDA %d, of a driver of %d", name, version,
                        configuration.driver_version);
    for (size_t i = 0; i < NUM_ENTRY_POINTS; i++) {
        const entry_point *each = entry_points + i;
        if (strcmp(each->name, name) != 0 || each->since > configuration.driver_version)
            continue;
        if (each->since > version) {
            if (!*found)
                *status = CU_GET_PROC_ADDRESS_VERSION_NOT_SUFFICIENT;
            continue;
        }
        *found = each->address;
        *status = CU_GET_PROC_ADDRESS_SUCCESS;
    }
    return *found ? CUDA_SUCCESS
                  : complain(CUDA_ERROR_NOT_FOUND, "%s of CUDA %d is not there", name, version);
}

ENTRY(NEEDS_NOTHING, cuGetProcAddress_v2, 0,
      (const char *name, void **found, int version, cuuint64_t flags,
       CUdriverProcAddressQueryResult *status),
      (name, found, version, flags, status)) {
    (void)flags; /* no function has a version of its own for streams of threads */
    return find_entry_point(name, found, version, status);
}

#undef cuGetProcAddress
ENTRY(NEEDS_NOTHING, cuGetProcAddress, 0,
      (const char *name, void **found, int version, cuuint64_t flags),
      (name, found, version, flags)) {
    (void)flags;
    return find_entry_point(name, found, version, NULL);
}

static const struct {
    CUresult error;
    const char *name, *text;
} errors[] = {
    {CUDA_SUCCESS, "CUDA_SUCCESS", "no error"},
    {CUDA_ERROR_INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {CUDA_ERROR_OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {CUDA_ERROR_NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {CUDA_ERROR_NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {CUDA_ERROR_INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {CUDA_ERROR_INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {CUDA_ERROR_NO_BINARY_FOR_GPU, "CUDA_ERROR_NO_BINARY_FOR_GPU",
     "no kernel image is available for execution on the device"},
    {CUDA_ERROR_INVALID_PTX, "CUDA_ERROR_INVALID_PTX", "a PTX JIT compilation failed"},
    {CUDA_ERROR_INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {CUDA_ERROR_ILLEGAL_STATE, "CUDA_ERROR_ILLEGAL_STATE",
     "the operation cannot be performed in the present state"},
    {CUDA_ERROR_NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {CUDA_ERROR_NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {CUDA_ERROR_ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS",
     "an illegal memory access was encountered"},
    {CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED",
     "part or all of the requested memory range is already mapped"},
    {CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED",
     "pointer does not correspond to a registered memory region"},
    {CUDA_ERROR_MISALIGNED_ADDRESS, "CUDA_ERROR_MISALIGNED_ADDRESS", "misaligned address"},
    {CUDA_ERROR_LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {CUDA_ERROR_NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
     "operation not permitted when stream is capturing"},
    {CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
     "operation failed due to a previous error during capture"},
    {CUDA_ERROR_STREAM_CAPTURE_MERGE, "CUDA_ERROR_STREAM_CAPTURE_MERGE",
     "operation would result in a merge of separate capture sequences"},
    {CUDA_ERROR_STREAM_CAPTURE_UNMATCHED, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED",
     "capture was not ended in the same stream as it began"},
    {CUDA_ERROR_STREAM_CAPTURE_ISOLATION, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION",
     "dependency created on uncaptured work in another stream"},
    {CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT",
     "operation would make the legacy stream depend on a capturing blocking stream"},
    {CUDA_ERROR_CAPTURED_EVENT, "CUDA_ERROR_CAPTURED_EVENT",
     "operation not permitted on an event last recorded in a capturing stream"},
    {CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD, "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD",
     "attempt to terminate a thread-local capture sequence from another thread"},
};

#define NUM_ERRORS (sizeof errors / sizeof *errors)

/* Not the driver's business to count: no lock, so that a caller may ask at any time. */
CUresult cuGetErrorName(CUresult error, const char **name) {
    for (size_t i = 0; i < NUM_ERRORS; i++)
        if (errors[i].error == error) {
            *name = errors[i].name;
            return CUDA_SUCCESS;
        }
    *name = NULL;
    return CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
    for (size_t i = 0; i < NUM_ERRORS; i++)
        if (errors[i].error == error) {
            *text = errors[i].text;
            return CUDA_SUCCESS;
        }
    *text = NULL;
    return CUDA_ERROR_INVALID_VALUE;
}
