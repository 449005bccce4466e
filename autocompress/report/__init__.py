"""Tables and plots of a finished or running study."""
