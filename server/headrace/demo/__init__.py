"""`headrace demo` and `headrace up`: the whole system on this machine, on real home sales.

Both run from a checkout, whose `features/` and `model_repository/` they use, with an embedded
Valkey as the online store. They are clients and operators of the product, not a part of it: gateway
and monitor are processes of their own, called over gRPC like any others.
"""

from headrace.demo.story import demo, up

__all__ = ["demo", "up"]
