"""From a registration to an object and a source of its bytes."""
