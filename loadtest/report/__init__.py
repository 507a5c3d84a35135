"""From recorded requests to figures, tables and pages."""
