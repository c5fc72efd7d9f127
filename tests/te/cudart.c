// Answers the CUDA runtime's questions about devices, so that fake tensors "on cuda" can be made without a driver. Nothing
// is computed: a kernel that is started anyway fails.
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaSetDevice(int device) { return 0; }
int cudaInitDevice(int device, unsigned flags, unsigned more) { return 0; }
int cudaGetDeviceCount(int *count) { *count = 8; return 0; }
int cudaGetLastError(void) { return 0; }
int cudaPeekAtLastError(void) { return 0; }
int cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
int cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }
int cudaDeviceSynchronize(void) { return 0; }
int cudaStreamSynchronize(void *stream) { return 0; }
int cudaStreamQuery(void *stream) { return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return 0; }
// compute capability 9.0 (attributes 75 and 76), 132 multiprocessors (16)
int cudaDeviceGetAttribute(int *value, int name, int device) { *value = name == 75 ? 9 : name == 76 ? 0 : name == 16 ? 132 : 1; return 0; }
int cudaStreamIsCapturing(void *stream, int *state) { *state = 0; return 0; }
int cudaThreadExchangeStreamCaptureMode(int *mode) { return 0; }
int cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority) { *stream = (void *)1; return 0; }
int cudaEventCreateWithFlags(void **event, unsigned flags) { *event = (void *)1; return 0; }
int cudaEventRecord(void *event, void *stream) { return 0; }
int cudaEventDestroy(void *event) { return 0; }
int cudaStreamWaitEvent(void *stream, void *event, unsigned flags) { return 0; }
