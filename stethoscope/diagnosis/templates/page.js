"use strict";
// what Gradio gives to the viewer in the app: its element, its value, and no server to ask for more
(function (element, props, watch, trigger) {
{{ viewer }}
})(document.querySelector("main"), { value: document.getElementById("data").textContent }, () => {}, null);
