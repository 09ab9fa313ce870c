"""TRL's trainers of preferences, on packed rows of token trees."""

import warnings

# TRL warns of whatever lies in `trl.experimental` as soon as one of these is imported; users of its stable trainers here
# need not hear of it, and those of the others are told by the versions that this package asks for.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import trl.experimental.cpo
    import trl.experimental.orpo
    import trl.experimental.tpo  # noqa: F401
