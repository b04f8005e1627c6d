"""Configuration: a file, the environment and calls, into frozen settings."""

from __future__ import annotations

from modelcache.config.load import Effective, check_text, effective, json_schema, missing_files, settings_of

__all__ = [
    "Effective",
    "check_text",
    "config_schema",
    "effective",
    "json_schema",
    "load_config",
    "missing_files",
    "settings_of",
]

#: The names they have in `modelcache`, where "effective" alone would say too little.
load_config = effective
config_schema = json_schema
