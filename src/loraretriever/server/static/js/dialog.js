// A modal dialog: the browser's own, which keeps the focus and closes on Escape.
import { html, useId, useLayoutEffect, useRef } from "./html.js";

export function Dialog({ title, onClose, children }) {
  const dialog = useRef();
  const id = useId();
  useLayoutEffect(() => {
    const element = dialog.current;
    const before = document.activeElement;
    element.showModal();
    return () => {
      element.close();
      before?.focus?.();
    };
  }, []);
  const onCancel = (event) => {
    event.preventDefault(); // the owner takes the dialog away
    onClose();
  };
  const onMouseDown = (event) => event.target === dialog.current && onClose(); // beside it
  return html`
    <dialog ref=${dialog} aria-labelledby=${id} onCancel=${onCancel} onMouseDown=${onMouseDown}>
      <div class="dialog-body">
        <header class="row spread">
          <h2 id=${id}>${title}</h2>
          <button class="small" onClick=${onClose}>Close</button>
        </header>
        ${children}
      </div>
    </dialog>
  `;
}
