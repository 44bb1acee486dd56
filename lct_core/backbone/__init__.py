"""What an adapter tells the engine about a single-shot DiT: inputs of a shot, traits of the model, the protocol."""

from lct_core.backbone.adapter import QKV, Backbone, Site, State
from lct_core.backbone.inputs import ShotInput, collate_shots
from lct_core.backbone.traits import Extra, TextPath, Traits

__all__ = ["QKV", "Backbone", "Extra", "ShotInput", "Site", "State", "TextPath", "Traits", "collate_shots"]
