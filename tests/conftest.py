"""How long hypothesis searches: `make fuzz` asks for the long profile."""

from hypothesis import settings

settings.register_profile("long", max_examples=10_000)
