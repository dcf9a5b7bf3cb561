#!/usr/bin/env bash
# run.sh [--graphs] COMMAND...: runs the command with two emulated CUDA devices and the package of `make emulator`.
#
# --graphs keeps PyTorch's allocator on, which graphs need. Otherwise every tensor is an allocation, whose ends the
# emulator knows.
here=$(cd "$(dirname "$0")" && pwd)
EMULATOR=${EMULATOR:-$here/../../build/emulator}
export CUDAEMU_PTX=$EMULATOR/ptx
export PYTHONPATH=$here:$EMULATOR/package${PYTHONPATH:+:$PYTHONPATH}
if [ "$1" = --graphs ]; then shift; else export PYTORCH_NO_CUDA_MEMORY_CACHING=1; fi
export OMP_NUM_THREADS=1
# Freed memory stays in the process: what is known of each byte is allocated and freed with its allocation.
export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296
LD_LIBRARY_PATH=$EMULATOR${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} LD_PRELOAD=$EMULATOR/libcudaemu.so exec "$@"
