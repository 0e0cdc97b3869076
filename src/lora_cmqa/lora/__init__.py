"""The adapter: put in, run, saved, loaded, merged."""

from .peft_door import import_peft

import_peft()  # before the room's files import what they need of it
