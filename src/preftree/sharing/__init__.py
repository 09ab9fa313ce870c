"""`share_prefixes`: any training loop's padded batches through trees."""

from preftree.sharing.patch import PrefixSharing, share_prefixes

__all__ = ["PrefixSharing", "share_prefixes"]
