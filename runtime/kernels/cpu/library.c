#include "library.h"

#include "isa.h"

#define DOMAIN "cierzo"

typedef OrtStatus *(*CreateDomain)(const char *, OrtCustomOpDomain **);
typedef OrtStatus *(*AddOp)(OrtCustomOpDomain *, const OrtCustomOp *);
typedef OrtStatus *(*AddDomain)(OrtSessionOptions *, OrtCustomOpDomain *);

static Op *const OPS[] = {
    &gated_activation_op,
    &rms_norm_op,
    &mixture_of_experts_op,
    &mixture_of_experts_float16_op,
    &mixture_of_experts_bfloat16_op,
    &quantized_matmul_op,
    &quantized_matmul_float16_op,
    &quantized_mixture_of_experts_op,
    &quantized_mixture_of_experts_float16_op,
    &stored_matmul_op,
    &stored_matmul_float16_op,
    &stored_matmul_bfloat16_op,
    &rolling_attention_float_op,
    &rolling_attention_half_op,
    &rolling_attention_int8_op,
};
enum { NUM_OPS = sizeof OPS / sizeof OPS[0] };

/* When the library is loaded, and not with each session: another thread may be running these operators by then. */
__attribute__((constructor)) static void prepare_all(void) {
    for (int i = 0; i < NUM_OPS; i++) prepare(OPS[i]);
}

const char *cierzo_isa(void) { return isa_name(isa_level()); }

const char *cierzo_op(int index) { return index >= 0 && index < NUM_OPS ? OPS[index]->name : NULL; }

OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
    const OrtApi *api = base->get_api(CIERZO_ORT_API_VERSION);
    OrtCustomOpDomain *domain = NULL;
    OrtStatus *status = ((CreateDomain)(uintptr_t)api->entries[ORT_CREATE_CUSTOM_OP_DOMAIN])(DOMAIN, &domain);
    for (int i = 0; status == NULL && i < NUM_OPS; i++)
        status = ((AddOp)(uintptr_t)api->entries[ORT_CUSTOM_OP_DOMAIN_ADD])(domain, &OPS[i]->base);
    /* The domain is never released: sessions made with these options go on using it. */
    return status != NULL ? status : ((AddDomain)(uintptr_t)api->entries[ORT_ADD_CUSTOM_OP_DOMAIN])(options, domain);
}
