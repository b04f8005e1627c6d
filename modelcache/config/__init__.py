"""Configuration: a file, the environment and calls, into frozen settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def settings_of(call: Mapping[str, Any]) -> Any:
    """Settings from keyword values by dotted key; `None` is not set."""
    from modelcache.config.layers import from_keywords, overlay
    from modelcache.config.schema import Settings
    from modelcache.errors import ConfigError

    settings, findings = from_keywords(call, "call")
    if findings:
        raise ConfigError(tuple(findings))
    return Settings.model_validate(overlay({}, settings))
