"""``ray start`` for a node of a local cluster, bound to loopback.

Ray takes 127.0.0.1 for the machine's public address and then listens on every interface. It stays with loopback where
it is told that there are no clusters (``RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0``, which all processes of the local cluster
inherit), but then starts no second node. So the node's own start, and that alone, is let past both.
"""

if __name__ == "__main__":
    from ray._private import ray_constants, services
    from ray.scripts.scripts import main

    ray_constants.ENABLE_RAY_CLUSTER = True
    services.resolve_ip_for_localhost = lambda host: host
    main()
