/* The part of ONNX Runtime's C interface that a custom operator needs, declared by hand.
 *
 * That interface is a table of functions which only ever grows at its end (onnxruntime_c_api.h says so), so that an
 * entry's number is as stable as its name. Declaring the few that are used here lets the kernels be built with a C
 * compiler alone: no package of headers exists on the registries.
 */
#ifndef CIERZO_ABI_H
#define CIERZO_ABI_H

#include <stddef.h>
#include <stdint.h>

typedef struct OrtApi OrtApi;
typedef struct OrtStatus OrtStatus;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtValue OrtValue;
typedef struct OrtShape OrtShape; /* OrtTensorTypeAndShapeInfo */
typedef struct OrtCustomOpDomain OrtCustomOpDomain;
typedef struct OrtSessionOptions OrtSessionOptions;

typedef struct OrtApiBase {
    const OrtApi *(*get_api)(uint32_t version);
    const char *(*get_version_string)(void);
} OrtApiBase;

#define CIERZO_ORT_API_VERSION 18 /* ParallelFor and MayInplace are the youngest entries that are used */

struct OrtApi {
    void *entries[300];
};

/* Numbers of the entries, counted from 0 in the order of onnxruntime_c_api.h. */
enum {
    ORT_CREATE_STATUS = 0,
    ORT_CREATE_CUSTOM_OP_DOMAIN = 26,
    ORT_CUSTOM_OP_DOMAIN_ADD = 27,
    ORT_ADD_CUSTOM_OP_DOMAIN = 28,
    ORT_GET_TENSOR_MUTABLE_DATA = 51,
    ORT_GET_TENSOR_ELEMENT_TYPE = 60,
    ORT_GET_DIMENSIONS_COUNT = 61,
    ORT_GET_DIMENSIONS = 62,
    ORT_GET_TENSOR_TYPE_AND_SHAPE = 65,
    ORT_KERNEL_INFO_FLOAT = 85,
    ORT_KERNEL_INFO_INT64 = 86,
    ORT_KERNEL_INFO_STRING = 87,
    ORT_KERNEL_CONTEXT_INPUT_COUNT = 88,
    ORT_KERNEL_CONTEXT_INPUT = 90,
    ORT_KERNEL_CONTEXT_OUTPUT = 91,
    ORT_RELEASE_STATUS = 93,
    ORT_RELEASE_SHAPE = 99,
    ORT_KERNEL_CONTEXT_PARALLEL_FOR = 274,
};

/* Element types, as ONNX numbers them. */
enum { TYPE_FLOAT = 1, TYPE_UINT8 = 2, TYPE_INT8 = 3, TYPE_INT64 = 7, TYPE_FLOAT16 = 10, TYPE_BFLOAT16 = 16 };

/* How an input or output may be left out. */
enum { REQUIRED = 0, OPTIONAL = 1 };

typedef struct OrtCustomOp OrtCustomOp;
struct OrtCustomOp {
    uint32_t version;
    void *(*create_kernel)(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *);
    const char *(*name)(const OrtCustomOp *);
    const char *(*provider)(const OrtCustomOp *);
    int (*input_type)(const OrtCustomOp *, size_t);
    size_t (*input_count)(const OrtCustomOp *);
    int (*output_type)(const OrtCustomOp *, size_t);
    size_t (*output_count)(const OrtCustomOp *);
    void (*compute)(void *, OrtKernelContext *);
    void (*destroy)(void *);
    int (*input_characteristic)(const OrtCustomOp *, size_t);
    int (*output_characteristic)(const OrtCustomOp *, size_t);
    int (*input_memory)(const OrtCustomOp *, size_t);
    int (*variadic_input_min)(const OrtCustomOp *);
    int (*variadic_input_homogeneity)(const OrtCustomOp *);
    int (*variadic_output_min)(const OrtCustomOp *);
    int (*variadic_output_homogeneity)(const OrtCustomOp *);
    OrtStatus *(*create_kernel_v2)(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *, void **);
    OrtStatus *(*compute_v2)(void *, OrtKernelContext *);
    OrtStatus *(*infer_shape)(const OrtCustomOp *, void *);
    int (*start_version)(const OrtCustomOp *);
    int (*end_version)(const OrtCustomOp *);
    size_t (*may_inplace)(int **inputs, int **outputs);
    void (*release_may_inplace)(int *inputs, int *outputs);
    size_t (*alias_map)(int **inputs, int **outputs);
    void (*release_alias_map)(int *inputs, int *outputs);
};

#endif
