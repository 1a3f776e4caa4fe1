"""Tables, pictures and pages: from finished numbers to what people look at."""
