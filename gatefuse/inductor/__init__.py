"""gatefuse inside Inductor: finds gates, rewrites them, and lowers what it wrote. Private."""
