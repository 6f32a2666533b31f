"""What happened to each site, as data (`model`), as a table for people (`table`)."""
