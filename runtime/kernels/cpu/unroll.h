/* UNROLL before a loop of a few rounds, so that arrays which it indexes can live in registers. */
#ifndef CIERZO_UNROLL_H
#define CIERZO_UNROLL_H

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define UNROLL _Pragma("GCC unroll 16")
#else
#define UNROLL
#endif

#endif
