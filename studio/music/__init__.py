"""Music: what models of sounds share, whatever their family."""
