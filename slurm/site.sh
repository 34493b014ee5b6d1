#!/usr/bin/env bash
# What your site needs: every job of this folder sources this file before it starts anything, on
# the job's first node. srun hands the variables that are exported here on to all tasks. Lines are
# examples: remove the # of those that you need. "Not tested" means: no test runs it.

# Modules. A job that is submitted with --export=NONE may have no `module` command yet.
# source /etc/profile.d/modules.sh
# module load cuda/12.8

# Python. The virtual environment .venv is activated after this file, if there is one. Else, conda:
# source /opt/conda/etc/profile.d/conda.sh && conda activate i3dist

# The network between the nodes, for NCCL, and for gloo where a host's name leads to loopback.
# export NCCL_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5
# export GLOO_SOCKET_IFNAME=eth0
# export NCCL_DEBUG=INFO    # what NCCL found; each rank's is in its file of slurm-JOB.ranks

# Where ranks find each other: a port, if Slurm's jobs may not use those from 10240 to 30239.
# export MASTER_PORT=29500

# Options for srun, such as how tasks are bound to CPUs.
# srun_options+=(--cpu-bind=cores)

# Caches of compiled kernels, if the home folder is small or slow.
# export TRITON_CACHE_DIR=/scratch/$USER/triton TORCHINDUCTOR_CACHE_DIR=/scratch/$USER/inductor

# A container, through pyxis (not tested). It has to hold this project's dependencies, bash and tee,
# and to see the repository, the data and the runs. Only train.sbatch starts its program with srun.
# srun_options+=(--container-image=/images/i3dist.sqsh --container-mounts=/work:/work)
# srun_options+=(--container-workdir="$PWD")

# A container, through apptainer (not tested; a stand-in for apptainer is). Name the folders above
# the repository, the data and the runs.
# python=(apptainer exec --nv --bind /work --pwd "$PWD" /images/i3dist.sif python3)
