"""Clusters: blocks of threads that run at once and can read each other's shared memory, from Hopper on."""

import contextlib

MAX_BLOCKS = 8  # on any GPU that has clusters (CUDA C++ Programming Guide, "Thread Block Clusters")


def launch_cluster(blocks):
    """Returns a context in which so many blocks along z are launched as a cluster; one of them is none."""
    from tvm.tirx.script.builder import ir as build

    return contextlib.nullcontext() if blocks == 1 else build.launch_thread("clusterCtaIdx.z", blocks)


def synchronize_cluster():
    """Emits a barrier of all threads of a cluster that have not ended, after which they see what others have stored."""
    from tvm.script import tirx as T
    from tvm.tirx.script.builder import ir as build

    build.evaluate(T.ptx["barrier.cluster.arrive.release.aligned"]())
    build.evaluate(T.ptx["barrier.cluster.wait.acquire.aligned"]())


def shared_address(shared, place):
    """Returns the address of an element of a buffer in shared memory, as load_from_block() takes it."""
    from tvm.script import tirx as T
    from tvm.tirx.script.builder import ir as build

    return build.Bind(T.cuda.cvta_generic_to_shared(T.address_of(shared[place])))


def load_from_block(address, block, loaded, count=1):
    """Emits loaded[:count] = what lies at an address in the shared memory of a block of the same cluster, in fp32.

    address: shared_address()'s, of a multiple of count elements; count: 1, 2 or 4; block: its number, an expression.
    """
    from tvm.script import tirx as T
    from tvm.tirx.script.builder import ir as build

    there = build.alloc_buffer((1,), "uint32", scope="local")
    vector = f"v{count}." if count > 1 else ""
    build.evaluate(T.ptx["mapa.shared::cluster.u32"](there[0], address, T.Cast("uint32", block)))
    build.evaluate(T.ptx[f"ld.shared::cluster.{vector}f32"](*(loaded[j] for j in range(count)), there[0]))
