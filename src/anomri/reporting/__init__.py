"""What people look at: the report, its pictures and plots, previews, and the viewer."""
